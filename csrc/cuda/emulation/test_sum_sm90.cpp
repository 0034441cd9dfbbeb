// The test of the fused sums, with the function of sm_90a in the place of that of sm_80, which it
// calls for what it does not serve.

#include "cuda/fused/kernels.h"
#include "fused_cases.h"

#define fused_sum_tile sm90::fused_sum_tile
#define main test_of_sm80
#include "test_fused_sum.cpp"
#undef main

namespace {

// Rows at multiples of 16 bytes, a gradient of 16 bits, and one threshold for both directions.
void test_served() {
  const int64_t shapes[][3] = {{131, 40, 64}, {20, 264, 40}, {270, 136, 72}};
  int64_t k = 0;
  for (const auto& shape : shapes) {
    for (const char* loss : {"uss", "uce"}) {
      for (const bool both : {false, true}) {
        SumCase c = {};
        c.loss = loss;
        c.kind = kKinds[(k + k / 4) % 2];
        c.n = shape[0], c.m = shape[1], c.depth = shape[2];
        c.gap = c.gradient_gap = 8;
        c.both = both;
        c.mirrored = both || k % 3 == 0;
        c.per_column = !c.mirrored && k % 4 == 2;
        c.weights = k % 3 != 1;
        c.dthreshold = k % 5 != 4;
        c.gradient = k % 7 != 6;
        c.gradient_dtype = c.kind.dtype;
        c.diagonal = k % 3 == 0 ? INT64_MIN : k % 3 == 1 ? -3 : 128;
        c.not_finite = k / 3 % 2 == 0;
        const Operands operands(c.kind, c.n, c.m, c.depth, c.gap);
        expect(cuda::sm90::supports(operands.given(), c.n, c.m, operands.a.data, c.kind.dtype,
                                    c.m + c.gradient_gap),
               1.0, 0.0, "supports", c.n, c.m);
        test_sum(c);
        ++k;
      }
    }
  }
}

}  // namespace

int main(int argc, char**) {
  return checks::run(argc, [] {
    test_served();
    if (thorough) test_sums();
  });
}
