// What the attention kernels are told: plain pointers and element strides.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lemo::cuda::attention {

// A [rows, heads, head_dim] tensor whose last dimension is contiguous.
struct Rows {
  void* data;
  int64_t row_stride;
  int64_t head_stride;
};

struct Documents {
  const int32_t* cu_seqlens;  // [count + 1]
  const int32_t* rows;        // [capacity] storage rows, or null: packed row i is storage row i
  int32_t count;
  int64_t capacity;
};

struct ForwardParams {
  Rows q, k, v, out;
  float* lse;
  int64_t lse_stride;
  Documents documents;
  int32_t heads;
  int32_t group;  // query heads per key head
  float scale;
};

struct BackwardParams {
  Rows dout, q, k, v, out, dq, dk, dv;
  const float* lse;
  int64_t lse_stride;
  Documents documents;
  const float* key_weights;  // null: every weight is 1
  const int32_t* row_slots;
  int32_t heads;
  int32_t key_heads;
  int32_t group;
  float scale;
  float* delta;     // workspace [heads, capacity]: dout . out
  float* dq_float;  // workspace [capacity, heads, head_dim], or null: dq comes from its own kernel
};

// One definition per head_dim; each throws LEMO_UNSUPPORTED for a type this build leaves out.
template <int kHeadDim>
void launch_forward(const ForwardParams& params, int32_t dtype, cudaStream_t stream);
template <int kHeadDim>
void launch_backward(const BackwardParams& params, int32_t dtype, cudaStream_t stream);

}  // namespace lemo::cuda::attention
