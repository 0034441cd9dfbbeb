// The tile kernels for one instruction set. Compiled once per set, with UF_ISA naming it.
#include <cstring>

#include "cpu/histogram_tile.h"
#include "cpu/kernels.h"
#include "cpu/logsumexp_pairs_tile.h"
#include "cpu/logsumexp_tile.h"
#include "cpu/nearest_tile.h"
#include "cpu/normalize_rows.h"
#include "cpu/permuted.h"
#include "cpu/sum_tile.h"
#include "cpu/update_rows.h"

#define UF_TEXT2(x) #x
#define UF_TEXT(x) UF_TEXT2(x)
#define UF_JOIN2(a, b) a##b
#define UF_JOIN(a, b) UF_JOIN2(a, b)

namespace unitsface::cpu {
namespace {

bool run_sum_tile(const char* loss, const float* params, const SumTile& t, int threads) {
#define UF_SUM_LOSS(name, Policy)         \
  if (std::strcmp(loss, #name) == 0) {    \
    sum_tile(Policy(params), t, threads); \
    return true;                          \
  }
#include "unitsface/loss_list.def"
  return false;
}

bool run_logsumexp_tile(const char* loss, const float* params, const LogsumexpTileArgs& t,
                        int threads) {
#define UF_LOGSUMEXP_LOSS(name, Policy)         \
  if (std::strcmp(loss, #name) == 0) {          \
    logsumexp_tile(Policy(params), t, threads); \
    return true;                                \
  }
#include "unitsface/loss_list.def"
  return false;
}

bool run_logsumexp_gradient_tile(const char* loss, const float* params,
                                 const LogsumexpGradientArgs& t, int threads) {
#define UF_LOGSUMEXP_LOSS(name, Policy)                  \
  if (std::strcmp(loss, #name) == 0) {                   \
    logsumexp_gradient_tile(Policy(params), t, threads); \
    return true;                                         \
  }
#include "unitsface/loss_list.def"
  return false;
}

bool run_positive_rows(const char* loss, const float* params, const float* cosine, int64_t n,
                       float* logit, float* slope) {
#define UF_LOGSUMEXP_LOSS(name, Policy)           \
  if (std::strcmp(loss, #name) == 0) {            \
    const Policy policy(params);                  \
    for (int64_t i = 0; i < n; ++i) {             \
      const Logit z = policy.positive(cosine[i]); \
      logit[i] = z.value;                         \
      slope[i] = z.dcosine;                       \
    }                                             \
    return true;                                  \
  }
#include "unitsface/loss_list.def"
  return false;
}

bool run_pair_negatives_tile(const char* loss, const float* params, const PairNegatives& t,
                             int threads) {
#define UF_PAIR_LOGSUMEXP_LOSS(name, Policy)                \
  if (std::strcmp(loss, #name) == 0) {                      \
    pair_negatives_tile<false>(Policy(params), t, threads); \
    return true;                                            \
  }
#define UF_PAIR_LOGSUMEXPS_LOSS(name, Policy)              \
  if (std::strcmp(loss, #name) == 0) {                     \
    pair_negatives_tile<true>(Policy(params), t, threads); \
    return true;                                           \
  }
#include "unitsface/loss_list.def"
  return false;
}

bool run_pair_positives_tile(const char* loss, const float* params, const PairPositives& t,
                             int threads) {
#define UF_PAIR_LOGSUMEXP_LOSS(name, Policy)         \
  if (std::strcmp(loss, #name) == 0) {               \
    pair_positives_tile(Policy(params), t, threads); \
    return true;                                     \
  }
#include "unitsface/loss_list.def"
  return false;
}

bool run_pair_gradient_tile(const char* loss, const float* params, const PairGradient& t,
                            int threads) {
#define UF_PAIR_LOGSUMEXP_LOSS(name, Policy)               \
  if (std::strcmp(loss, #name) == 0) {                     \
    pair_gradient_tile<false>(Policy(params), t, threads); \
    return true;                                           \
  }
#define UF_PAIR_LOGSUMEXPS_LOSS(name, Policy)             \
  if (std::strcmp(loss, #name) == 0) {                    \
    pair_gradient_tile<true>(Policy(params), t, threads); \
    return true;                                          \
  }
#include "unitsface/loss_list.def"
  return false;
}

}  // namespace

extern const Kernels UF_JOIN(kernels_, UF_ISA) = {
    UF_TEXT(UF_ISA),
    run_sum_tile,
    run_logsumexp_tile,
    run_logsumexp_gradient_tile,
    run_positive_rows,
    normalize_rows,
    normalize_rows_backward,
    run_pair_negatives_tile,
    run_pair_positives_tile,
    run_pair_gradient_tile,
    histogram_tile,
    nearest_tile,
    permuted,
    update_rows,
    nullptr,
    nullptr,
};

}  // namespace unitsface::cpu
