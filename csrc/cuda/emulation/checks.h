// Shared by the tests of the emulated kernels. A test prints the differences and exits with 1.
// python_tests/kernels/test_cuda_codegen.py builds test_<name>.cpp with <name>.cu and runs it.
#pragma once

#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>

#include "cuda/kernels.h"
#include "cuda_emulation.h"

// Replaces the CUDA library; a test is one translation unit and includes this once.
extern "C" {
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return ""; }
const char* cudaGetErrorString(cudaError_t) { return ""; }
}

namespace unitsface::checks {

inline const float kNaN = std::numeric_limits<float>::quiet_NaN();
inline std::mt19937 random_bits(1);
inline int failures = 0;
inline int64_t checks = 0;

inline float uniform(float low, float high) {
  return std::uniform_real_distribution<float>(low, high)(random_bits);
}

inline int64_t integer(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random_bits);
}

// Exactly of the requested length, on the heap: AddressSanitizer finds the first access beyond.
// `shift` elements of 4 bytes move the start off 16-byte alignment.
template <class T>
struct Buffer {
  std::unique_ptr<char[]> memory;
  T* data;
  int64_t size;

  Buffer(int64_t count, T value, int shift = 0) : size(count) {
    memory.reset(new char[count * sizeof(T) + 4 * shift]);
    data = reinterpret_cast<T*>(memory.get() + 4 * shift);
    std::fill(data, data + count, value);
  }
  T& operator[](int64_t i) { return data[i]; }
};

inline void expect(float got, double wanted, double tolerance, const std::string& what, int64_t i,
                   int64_t j) {
  ++checks;
  const bool same = std::isnan(wanted)
                        ? std::isnan(got)
                        : std::fabs(got - wanted) <= tolerance * (1.0 + std::fabs(wanted));
  if (same || (std::isinf(wanted) && got == wanted)) return;
  if (++failures <= 20) {
    std::printf("%s [%ld, %ld]: got %.9g, wanted %.9g\n", what.c_str(), static_cast<long>(i),
                static_cast<long>(j), got, wanted);
  }
}

inline float element(const void* data, DType dtype, int64_t k) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(data)[k];
    case DType::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[k]);
    default:
      return __half2float(static_cast<const __half*>(data)[k]);
  }
}

inline void set_element(void* data, DType dtype, int64_t k, float value) {
  switch (dtype) {
    case DType::kFloat32:
      static_cast<float*>(data)[k] = value;
      break;
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(data)[k] = __float2bfloat16_rn(value);
      break;
    default:
      static_cast<__half*>(data)[k] = __float2half_rn(value);
  }
}

inline int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline double tolerance_of(DType dtype) {
  return dtype == DType::kFloat32 ? 1e-5 : dtype == DType::kBFloat16 ? 5e-3 : 7e-4;
}

// True if the test was called with an argument: every case runs in either order of the threads of
// a block, and the cases that take a minute run, too.
inline bool thorough = false;

// Runs `all`, without `thorough` with each launch in one of the two orders.
inline int run(int argc, void (*all)()) {
  thorough = argc > 1;
  if (thorough) {
    for (const bool descending : {false, true}) {
      emulation::descending = descending;
      all();
    }
  } else {
    emulation::mixed = true;
    all();
  }
  std::printf("%ld checks, %d failures\n", static_cast<long>(checks), failures);
  return failures == 0 ? 0 : 1;
}

// True if `call` launched a kernel.
template <class Call>
void expect_no_launch(const Call& call, const std::string& what) {
  emulation::launches = 0;
  call();
  expect(static_cast<float>(emulation::launches), 0.0, 0.0, "launches of an empty " + what, 0, 0);
}

}  // namespace unitsface::checks
