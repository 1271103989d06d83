// The parts of predict around its matrix products.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "src/backend.h"

namespace lemo::cuda {

// rstd [T] of the rows of x.
void row_scale(cudaStream_t stream, const lemo_tensor& x, bool layer, float eps, float* rstd);

// Pools rstd_t * active_t over the tokens [first, first + count) into pooled [num_blocks, s]. A block that spans two
// chunks is begun by one call and finished by the next.
void pool(cudaStream_t stream, int32_t dtype, bool maximum, const void* active, int64_t s, const float* rstd,
          const int32_t* offsets, int64_t num_blocks, int64_t first, int64_t count, float* pooled);

// out [num_blocks, c] = pooled [num_blocks, s] w3 [c, s]^T, in float32.
void project(cudaStream_t stream, const float* pooled, int64_t num_blocks, const lemo_tensor& w3, float* out);

// out [rows, columns] = in, where out may be strided.
void copy_rows(cudaStream_t stream, const float* in, int64_t rows, int64_t columns, const lemo_tensor& out);

// scores [num_blocks] from the suffix sums of the queries (written to `suffix`) and the keys, all [num_blocks, c].
void column_sums(cudaStream_t stream, const float* queries, const float* keys, float* suffix, const int32_t* documents,
                 int64_t num_documents, int64_t num_blocks, int64_t c, bool normalize, float* scores);

}  // namespace lemo::cuda
