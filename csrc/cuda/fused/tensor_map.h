// Tensor maps: what TMA copies need to know of a matrix. On the host.
#pragma once

#include <cuda.h>

#include "unitsface/tile_args.h"

namespace unitsface::cuda::sm90 {

// Whether copies can read or write a matrix of 16-bit elements with rows `stride` elements apart.
bool mappable(const void* data, int64_t rows, int64_t columns, int64_t stride);

// Boxes of box_rows x box_columns, with the 128-byte swizzle in shared memory. Throws
// std::runtime_error if the driver has no such function or returns an error.
CUtensorMap tensor_map(const void* data, DType dtype, int64_t rows, int64_t columns, int64_t stride,
                       int box_rows, int box_columns);

}  // namespace unitsface::cuda::sm90
