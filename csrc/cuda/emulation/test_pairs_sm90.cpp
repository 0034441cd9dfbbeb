// The test of the fused log-sum-exps over samples, with the functions of sm_90a in the place of
// those of sm_80, which they call for what they do not serve.

#include "cuda/fused/kernels.h"
#include "fused_cases.h"

#define fused_pair_negatives_tile sm90::fused_pair_negatives_tile
#define fused_pair_positives_tile sm90::fused_pair_positives_tile
#define fused_pair_gradient_tile sm90::fused_pair_gradient_tile
#define main test_of_sm80
#include "test_fused_pairs.cpp"
#undef main

namespace {

// Rows at multiples of 16 bytes, and a gradient of 16 bits: blocks of several tiles, tiles that end
// within a strip, and a diagonal through them.
void test_served() {
  const int64_t shapes[][3] = {{131, 40, 64}, {20, 264, 40}, {270, 136, 72}};
  int64_t k = 0;
  for (const auto& s : shapes) {
    for (const bool two : {false, true}) {
      for (const bool both : {false, true}) {
        const Kind kind = kKinds[(k + k / 4) % 2];
        const Operands operands(kind, s[0], s[1], s[2], 8);
        expect(
            cuda::sm90::supports(operands.given(), s[0], s[1], operands.a.data, kind.dtype, s[1]),
            1.0, 0.0, "supports", s[0], s[1]);
        const int64_t diagonal = k % 3 == 0 ? INT64_MIN : k % 3 == 1 ? -3 : 128;
        test_pairs({two ? "multi_similarity" : "pair_softmax", two, kind, s[0], s[1], s[2], 8, both,
                    kind.dtype, diagonal, k / 3 % 2 == 0});
        ++k;
      }
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
