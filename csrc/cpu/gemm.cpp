// GEMMs of the processor's instruction set, and the memory for their packed operands.
#include <memory>
#include <new>

#include "cpu/kernels.h"

namespace unitsface::cpu {
namespace {

constexpr std::align_val_t kLine{64};

struct Release {
  void operator()(void* memory) const { ::operator delete(memory, kLine); }
};

// Memory of the calling thread, up to kKept of it for its next calls as well: what an allocator
// returns to the system is faulted in again page by page.
class Workspace {
 public:
  uint32_t* of(int64_t words) {
    if (words > words_) {
      memory_.reset();
      words_ = 0;
      memory_.reset(::operator new(sizeof(uint32_t) * static_cast<size_t>(words), kLine));
      words_ = words;
    }
    return static_cast<uint32_t*>(memory_.get());
  }

  void release_excess() {
    if (words_ <= kKept) return;
    memory_.reset();
    words_ = 0;
  }

 private:
  static constexpr int64_t kKept = int64_t{4} << 20;  // 16 MB
  std::unique_ptr<void, Release> memory_;
  int64_t words_ = 0;
};

Gemm gemm_of(DType dtype) {
  if (dtype == DType::kFloat32) return kernels().gemm_f32;
  return dtype == DType::kBFloat16 ? kernels().gemm_bf16 : nullptr;
}

// 32-bit words for packed operands, as many as any instruction set takes: those of bfloat16 may be
// padded, and rows of `a` may be read as they are.
int64_t packed_words(const GemmArgs& t) {
  const bool single = t.dtype == DType::kFloat32;
  const int64_t words = single ? t.depth : (t.depth + 31) / 32 * 16;
  const bool as_it_is = t.a_depth == 1 && (single || (t.depth % 32 == 0 && t.n % 16 == 0));
  return ((as_it_is ? 0 : (t.n + 15) / 16) + (t.m + 15) / 16) * 16 * words;
}

}  // namespace

bool has_gemm(DType dtype) { return gemm_of(dtype) != nullptr; }

bool multiply(GemmArgs* gemms, size_t count, int threads) {
  const Gemm run = count == 0 ? nullptr : gemm_of(gemms[0].dtype);
  if (run == nullptr) return false;
  thread_local Workspace workspace;
  int64_t words = 0;
  for (size_t k = 0; k < count; ++k) words += packed_words(gemms[k]);
  uint32_t* next = workspace.of(words);
  for (size_t k = 0; k < count; ++k) {
    gemms[k].workspace = next;
    next += packed_words(gemms[k]);
  }
  run(gemms, static_cast<int64_t>(count), threads);
  workspace.release_excess();
  return true;
}

}  // namespace unitsface::cpu
