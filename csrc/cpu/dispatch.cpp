// Choice of the instruction set at run time.
#include <cstdlib>
#include <stdexcept>

#include "cpu/kernels.h"

namespace unitsface::cpu {

extern const Kernels kernels_baseline;
#if defined(UF_HAVE_X86_ISAS)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

namespace {

struct Candidate {
  const Kernels* kernels;
  bool usable;
};

std::vector<Candidate> candidates() {  // best first
#if defined(UF_HAVE_X86_ISAS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  return {{&kernels_avx512, avx512}, {&kernels_avx2, avx2}, {&kernels_baseline, true}};
#else
  return {{&kernels_baseline, true}};
#endif
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

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
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
