// The policy of a loss that is named when the program runs. Throw std::invalid_argument for an
// unknown loss.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "unitsface/losses.h"

namespace unitsface::cuda {

// run(policy), if there are kernels of it: none of them reads variables.
template <class Policy, bool kPresent = VariablesOf<Policy>::kCount == 0, class Run>
void with_policy(const std::string& loss, const float* params, const Run& run) {
  if constexpr (kPresent) {
    run(Policy(params));
  } else {
    throw std::invalid_argument("no CUDA kernels read the variables of loss " + loss);
  }
}

template <class Run>
void with_sum_policy(const std::string& loss, const float* params, const Run& run) {
#define UF_SUM_LOSS(name, Policy) \
  if (loss == #name) return with_policy<Policy>(loss, params, run);
#include "unitsface/loss_list.def"
  throw std::invalid_argument("no sum loss is called " + loss);
}

// Over classes.
template <class Run>
void with_logsumexp_policy(const std::string& loss, const float* params, const Run& run) {
#define UF_LOGSUMEXP_LOSS(name, Policy) \
  if (loss == #name) return with_policy<Policy>(loss, params, run);
#include "unitsface/loss_list.def"
  throw std::invalid_argument("no logsumexp loss is called " + loss);
}

// Over samples, with a log-sum-exp of the negatives alone.
template <class Run>
void with_pair_logsumexp_policy(const std::string& loss, const float* params, const Run& run) {
#define UF_PAIR_LOGSUMEXP_LOSS(name, Policy) \
  if (loss == #name) return with_policy<Policy>(loss, params, run);
#include "unitsface/loss_list.def"
  throw std::invalid_argument("no logsumexp loss over samples is called " + loss);
}

// run(policy, whether there is a log-sum-exp of the positives) of any loss over samples.
template <class Run>
void with_pair_policy(const std::string& loss, const float* params, const Run& run) {
  const auto two = [&](const auto& policy) { run(policy, std::true_type()); };
#define UF_PAIR_LOGSUMEXPS_LOSS(name, Policy) \
  if (loss == #name) return with_policy<Policy>(loss, params, two);
#include "unitsface/loss_list.def"
  with_pair_logsumexp_policy(loss, params,
                             [&](const auto& policy) { run(policy, std::false_type()); });
}

}  // namespace unitsface::cuda
