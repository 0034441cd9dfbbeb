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

thread_local Workspace workspace;

}  // namespace

bool has_gemm(DType dtype) { return gemm_of(dtype) != nullptr; }

bool multiply(const GemmArgs* gemms, size_t count, int threads) {
  const Gemm run = count == 0 ? nullptr : gemm_of(gemms[0].dtype);
  if (run == nullptr) return false;
  run(gemms, static_cast<int64_t>(count), threads);
  workspace.release_excess();
  return true;
}

uint32_t* gemm_workspace(int64_t words) { return workspace.of(words); }

}  // namespace unitsface::cpu
