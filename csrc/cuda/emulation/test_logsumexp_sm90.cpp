// The test of the fused log-sum-exps over classes, with the functions of sm_90a in the place of
// those of sm_80, which they call for what they do not serve.

#include "cuda/fused/kernels.h"
#include "fused_cases.h"

#define fused_logsumexp_tile sm90::fused_logsumexp_tile
#define fused_logsumexp_gradient_tile sm90::fused_logsumexp_gradient_tile
#define main test_of_sm80
#include "test_fused_logsumexp.cpp"
#undef main

namespace {

// Rows at multiples of 16 bytes, and a gradient like the operands.
void test_served() {
  const int64_t shapes[][3] = {{131, 40, 64}, {20, 264, 40}, {300, 136, 72}, {140, 16, 640}};
  for (const Kind& kind : {kKinds[0], kKinds[1]}) {
    for (const auto& s : shapes) {
      const Operands operands(kind, s[0], s[1], s[2], 8);
      expect(cuda::sm90::supports(operands.given(), s[0], s[1], operands.a.data, kind.dtype, s[1]),
             1.0, 0.0, "supports", s[0], s[1]);
      test_logsumexp(kind, s[0], s[1], s[2], 8, kind.dtype);
    }
  }
}

}  // namespace

int main(int argc, char**) {
  return checks::run(argc, [] {
    test_served();
    if (thorough) test_all();
  });
}
