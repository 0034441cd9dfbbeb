// The kernels for one instruction set. Compiled once per set, with UF_ISA naming it and
// UF_ISA_FLAGS holding the compiler's options.
#include <cstring>

#include "cpu/absolute_sums.h"
#include "cpu/centers.h"
#include "cpu/histogram_tile.h"
#include "cpu/kernels.h"
#include "cpu/nearest_tile.h"
#include "cpu/normalize_rows.h"
#include "cpu/permuted.h"
#include "cpu/policy_kernels.h"
#include "cpu/update_rows.h"
#include "unitsface/losses.h"

#define UF_TEXT2(x) #x
#define UF_TEXT(x) UF_TEXT2(x)
#define UF_JOIN2(a, b) a##b
#define UF_JOIN(a, b) UF_JOIN2(a, b)

namespace unitsface::cpu {
namespace {

const LossKernels* built_in(const char* loss) {
#define UF_KERNELS(name, kernels)                   \
  if (std::strcmp(loss, #name) == 0) {              \
    static constexpr LossKernels found = kernels(); \
    return &found;                                  \
  }
#define UF_SUM_LOSS(name, Policy) UF_KERNELS(name, sum_kernels<Policy>)
#define UF_LOGSUMEXP_LOSS(name, Policy) UF_KERNELS(name, logsumexp_kernels<Policy>)
#define UF_PAIR_LOGSUMEXP_LOSS(name, Policy) UF_KERNELS(name, pair_logsumexp_kernels<Policy>)
#define UF_PAIR_LOGSUMEXPS_LOSS(name, Policy) UF_KERNELS(name, pair_logsumexps_kernels<Policy>)
#include "unitsface/loss_list.def"
  return nullptr;
}

}  // namespace

extern const Kernels UF_JOIN(kernels_, UF_ISA) = {
    UF_TEXT(UF_ISA),
    UF_ISA_FLAGS,
    built_in,
    normalize_rows,
    normalize_rows_backward,
    histogram_tile,
    nearest_tile,
    largest_of_centers,
    spread_over_centers,
    absolute_sums,
    permuted,
    update_rows,
    nullptr,
    nullptr,
};

}  // namespace unitsface::cpu
