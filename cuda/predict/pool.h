// The parts of predict around its matrix products.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "src/backend.h"

namespace lemo::cuda {

// rstd [T] of the rows of x.
void row_scale(cudaStream_t stream, const lemo_tensor& x, bool layer, float eps, float* rstd);

// Pools rstd_t * active_t over the tokens of one chunk. A block that spans two chunks is begun by one call and finished
// by the next.
struct PoolArgs {
  int32_t dtype;
  bool maximum;
  const void* active;  // [count, s]
  int64_t s;
  const float* rstd;  // of all tokens
  const int32_t* offsets;
  int64_t num_blocks;
  int64_t first, count;  // the chunk: tokens [first, first + count)
  float* pooled;         // [num_blocks, s]
};
void pool(cudaStream_t stream, const PoolArgs& args);

// out [num_blocks, c] = pooled [num_blocks, s] w3 [c, s]^T, in float32.
void project(cudaStream_t stream, const float* pooled, int64_t num_blocks, const lemo_tensor& w3, float* out);

// out [rows, columns] = in, where out may be strided.
void copy_rows(cudaStream_t stream, const float* in, int64_t rows, int64_t columns, const lemo_tensor& out);

// scores [num_blocks] from the suffix sums of the queries and the keys.
struct ColumnSumArgs {
  const float* queries;  // [num_blocks, c], as are keys and suffix
  const float* keys;
  float* suffix;  // workspace: receives the suffix sums
  const int32_t* documents;
  int64_t num_documents, num_blocks, c;
  bool normalize;
  float* scores;
};
void column_sums(cudaStream_t stream, const ColumnSumArgs& args);

}  // namespace lemo::cuda
