// Choice of the instruction set at run time, and the losses that were compiled at run time.
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <unordered_map>

#include "cpu/kernels.h"

#if defined(UF_HAVE_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace unitsface::cpu {

extern const Kernels kernels_baseline;
#if defined(UF_HAVE_X86_ISAS)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif
void gemm_f32(const GemmArgs*, int64_t count, int threads);       // gemm_f32.cpp
void gemm_f32_avx2(const GemmArgs*, int64_t count, int threads);  // gemm_f32_avx2.cpp
void gemm_bf16(const GemmArgs*, int64_t count, int threads);      // gemm_bf16.cpp
void gemm_amx(const GemmArgs*, int64_t count, int threads);       // gemm_amx.cpp

namespace {

struct Candidate {
  const Kernels* kernels;
  bool usable;
};

#if defined(UF_HAVE_X86_ISAS)
// A set with one more GEMM.
Kernels extended(Kernels k, const char* isa, Gemm Kernels::* member, Gemm gemm) {
  k.isa = isa;
  k.*member = gemm;
  return k;
}

const Kernels& avx2() {
  static const Kernels found = extended(kernels_avx2, "avx2", &Kernels::gemm_f32, gemm_f32_avx2);
  return found;
}

const Kernels& avx512() {
  static const Kernels found = extended(kernels_avx512, "avx512", &Kernels::gemm_f32, gemm_f32);
  return found;
}
#endif

#if defined(UF_HAVE_AVX512BF16)
const Kernels& avx512bf16() {
  static const Kernels found = extended(avx512(), "avx512bf16", &Kernels::gemm_bf16, gemm_bf16);
  return found;
}
#endif

#if defined(UF_HAVE_AMX)
const Kernels& amx() {
  static const Kernels found = extended(avx512bf16(), "amx", &Kernels::gemm_bf16, gemm_amx);
  return found;
}

// Linux saves tile registers for processes that ask for them (arch/x86/include/uapi/asm/prctl.h).
bool has_tiles() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

std::vector<Candidate> candidates() {  // best first
  std::vector<Candidate> found;
#if defined(UF_HAVE_X86_ISAS)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(UF_HAVE_AVX512BF16)
  const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
#if defined(UF_HAVE_AMX)
  found.push_back({&amx(), has_bf16 && has_tiles()});
#endif
  found.push_back({&avx512bf16(), has_bf16});
#endif
  found.push_back({&avx512(), has_avx512});
  found.push_back({&avx2(), has_avx2});
#endif
  found.push_back({&kernels_baseline, true});
  return found;
}

std::string join(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

const Kernels& choose() {
  const char* wanted = std::getenv("UNITSFACE_CPU_ISA");
  for (const Candidate& c : candidates()) {
    if (c.usable && (wanted == nullptr || c.kernels->isa == std::string(wanted))) {
      return *c.kernels;
    }
  }
  throw std::invalid_argument("UNITSFACE_CPU_ISA must be one of " + join(usable_isas()) +
                              " on this processor, got " + wanted);
}

// Read without Python's lock.
std::mutex registered_mutex;

std::unordered_map<std::string, const LossKernels*>& registered() {
  static std::unordered_map<std::string, const LossKernels*> losses;
  return losses;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const LossKernels* kernels_of(const std::string& loss) {
  const LossKernels* built_in = kernels().of(loss.c_str());
  if (built_in != nullptr) return built_in;
  const std::lock_guard<std::mutex> lock(registered_mutex);
  const auto found = registered().find(loss);
  return found == registered().end() ? nullptr : found->second;
}

void register_loss(const std::string& loss, const LossKernels* kernels_of_loss) {
  if (kernels().of(loss.c_str()) != nullptr) {
    throw std::invalid_argument("'" + loss + "' is the name of a built-in loss");
  }
  const std::lock_guard<std::mutex> lock(registered_mutex);
  registered()[loss] = kernels_of_loss;
}

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Candidate& c : candidates()) names.emplace_back(c.kernels->isa);
  return names;
}

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Candidate& c : candidates()) {
    if (c.usable) names.emplace_back(c.kernels->isa);
  }
  return names;
}

}  // namespace unitsface::cpu
