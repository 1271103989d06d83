// Tensors and packed documents as the kernels of attention and scores receive them: plain pointers and element strides.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lemo::cuda {

// A [rows, heads, head_dim] tensor whose last dimension is contiguous.
struct TensorView {
  void* data;
  int64_t row_stride;
  int64_t head_stride;
};

struct Documents {
  const int32_t* cu_seqlens;  // [count + 1]
  const int32_t* row_map;     // [capacity] the storage row of each packed row; null: packed row i is storage row i
  int32_t count;
  int64_t capacity;
  bool aligned;  // queries whose keys are other rows: tiles need not begin where documents do (aligned_rows.cuh)
};

}  // namespace lemo::cuda
