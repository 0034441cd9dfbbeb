// What bindings of kernels share: numbers and pointers as Python gives them.
#pragma once

#include "fields.h"

namespace unitsface {

constexpr size_t kMostParameters = 16;

// Missing parameters are 0; a policy reads as many as it has.
inline const float* numbers(Params& params, size_t count) {
  if (params.size() < count) params.resize(count, 0.0f);
  return params.data();
}

inline float* floats(const Span& span, int64_t count) {
  if (span.second < count * static_cast<int64_t>(sizeof(float))) {
    throw std::invalid_argument("a vector of " + std::to_string(count) + " floats has " +
                                std::to_string(span.second) + " bytes");
  }
  return reinterpret_cast<float*>(span.first);
}

inline void* handle(std::uintptr_t address) { return reinterpret_cast<void*>(address); }

}  // namespace unitsface
