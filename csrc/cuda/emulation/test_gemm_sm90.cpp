// A GEMM out of the parts of the fused kernels for sm_90a: nothing but copies, products and stores.

#include "checks.h"
#include "cuda/fused/launch_sm90.cuh"

namespace {

using namespace unitsface;
using namespace unitsface::checks;
using namespace unitsface::cuda;

using Memory = sm90::Memory<3, 2>;

struct Store {
  const sm90::TensorMaps* maps;
  unsigned char* slabs;
  bool half;
  int warp;

  void prepare(const Tile&) const {}
  void operator()(const Tile& tile, const sm90::Products& products) const {
    sm90::store_tile<Memory::kWarpSlabs>(&maps->gradient, slabs, tile, products, half, warp);
  }
};

void gemm_kernel(const sm90::TensorMaps maps, const TileOrder order, int chunks, bool half,
                 const sm90::Grid grid) {
  const Memory memory{sm90::dynamic_shared()};
  const sm90::Range range = sm90::range_of(order, static_cast<int>(blockIdx.x), grid);
  sm90::run_block(maps, memory, range, chunks, [&](int consumer) {
    const int warp = sm90::team_of(consumer).row_warp();
    Store store = {&maps, memory.slabs(consumer * sm90::kWarpgroupWarps + warp), half, warp};
    sm90::consume(memory, range, order, chunks, half, consumer, store);
    sm90::finish_stores();
  });
}

void test_gemm(int64_t n, int64_t m, int64_t depth, DType dtype, sm90::Grid grid) {
  const int64_t a_stride = (depth + 7) / 8 * 8 + 8, stride = (m + 7) / 8 * 8 + 8;
  Buffer<uint16_t> a(n * a_stride, 0x7fff), b(m * a_stride, 0x7fff), out(n * stride, 0x4242);
  std::vector<float> left(n * depth), right(m * depth);
  const auto fill = [&](Buffer<uint16_t>& into, std::vector<float>& values, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t k = 0; k < depth; ++k) {
        set_element(into.data, dtype, i * a_stride + k, uniform(-1.0f, 1.0f));
        values[i * depth + k] = element(into.data, dtype, i * a_stride + k);
      }
    }
  };
  fill(a, left, n);
  fill(b, right, m);
  const FusedOperands operands = {a.data, b.data, dtype, false, depth, a_stride, a_stride};
  const TileOrder order(n, m);
  launch_persistent("gemm", gemm_kernel, grid, Memory::kBytes, nullptr,
                    sm90::tensor_maps(operands, n, m, out.data, dtype, stride, grid), order,
                    static_cast<int>(divide_up(depth, sm90::kChunk)), dtype == DType::kFloat16,
                    grid);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) {
      double wanted = 0.0;
      for (int64_t k = 0; k < depth; ++k) wanted += left[i * depth + k] * right[j * depth + k];
      expect(element(out.data, dtype, i * stride + j), wanted, tolerance_of(dtype), "product", i,
             j);
    }
    for (int64_t j = m; j < stride; ++j) {
      expect(out[i * stride + j], 0x4242, 0.0, "between rows", i, j);
    }
  }
}

}  // namespace

int main(int argc, char**) {
  return checks::run(argc, [] {
    // Row tiles of one column tile each, of odd and of even numbers of them; depths of one chunk,
    // of some, of all that fit, and of more; more blocks than row tiles; clusters of two, of which
    // the second block has rows or none.
    test_gemm(130, 20, 24, DType::kBFloat16, {1, 1});
    test_gemm(300, 300, 136, DType::kFloat16, {2, 2});
    test_gemm(520, 100, 64, DType::kBFloat16, {2, 1});
    test_gemm(130, 20, 530, DType::kBFloat16, {1, 1});
    if (!thorough) return;
    test_gemm(300, 300, 136, DType::kFloat16, {2, 1});
    test_gemm(1, 1, 1, DType::kBFloat16, {1, 1});
    test_gemm(300, 1040, 72, DType::kFloat16, {3, 1});
    test_gemm(128, 640, 512, DType::kBFloat16, {4, 1});
    test_gemm(257, 520, 512, DType::kBFloat16, {1, 1});
    test_gemm(1, 1, 1, DType::kBFloat16, {2, 2});
    test_gemm(520, 100, 64, DType::kBFloat16, {4, 2});
    test_gemm(256, 640, 512, DType::kFloat16, {4, 2});
    test_gemm(1000, 200, 72, DType::kBFloat16, {6, 2});
    test_gemm(200, 300, 1500, DType::kFloat16, {2, 2});
    test_gemm(300, 200, 776, DType::kBFloat16, {4, 2});
  });
}
