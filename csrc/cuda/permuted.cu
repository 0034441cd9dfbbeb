// Evaluates a permutation of the classes, and its inverse; one thread per element.

#include "common.cuh"
#include "kernels.h"
#include "unitsface/permutation.h"

namespace unitsface::cuda {

__global__ void __launch_bounds__(kThreads)
    permuted_kernel(const PermutedArgs args, const Permutation permutation) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < args.n) args.out[i] = permutation.permuted(args, Draw(args), i);
}

void permuted(const PermutedArgs& args, void* stream) {
  if (args.n == 0) return;
  launch("permuted", permuted_kernel, divide_up(args.n, kThreads), 1, stream, args,
         Permutation(args.size, args.key));
}

}  // namespace unitsface::cuda
