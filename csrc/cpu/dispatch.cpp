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
#if defined(UF_HAVE_AVX512BF16)
// bf16_product.cpp
void bf16_product(const Bf16ProductArgs&, int threads);
int64_t bf16_product_scratch(int64_t n, int64_t m, int64_t depth);
#endif

namespace {

struct Candidate {
  const Kernels* kernels;
  bool usable;
};

#if defined(UF_HAVE_AVX512BF16)
// The tile kernels of avx512 and products in bfloat16.
const Kernels& kernels_avx512bf16() {
  static const Kernels extended = [] {
    Kernels k = kernels_avx512;
    k.isa = "avx512bf16";
    k.bf16_product = bf16_product;
    k.bf16_product_scratch = bf16_product_scratch;
    return k;
  }();
  return extended;
}
#endif

std::vector<Candidate> candidates() {  // best first
  std::vector<Candidate> found;
#if defined(UF_HAVE_X86_ISAS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
#if defined(UF_HAVE_AVX512BF16)
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  found.push_back({&kernels_avx512bf16(), bf16});
#endif
  found.push_back({&kernels_avx512, avx512});
  found.push_back({&kernels_avx2, avx2});
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
