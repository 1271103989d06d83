// gather_norm: RMSNorm or LayerNorm of rows read at their original offsets.
#include "kernels.h"
#include "rows/rows.cuh"

namespace lemo::cuda {
namespace {

template <class T>
struct NormParams {
  const T* x;
  int64_t x_stride;
  const int32_t* rows;
  const T* residual;
  int64_t residual_stride;
  const void* weight;
  const void* bias;
  bool weight_float;
  bool layer;
  float eps;
  T* y;
  int64_t y_stride;
  T* packed;
  int64_t packed_stride;
  int64_t m;
  int vectors, d;
};

// s = s * weight + bias, for vector v of a row.
template <class T>
__device__ __forceinline__ void scale_and_shift(const NormParams<T>& p, int64_t v, float (&s)[kVector]) {
  if (p.weight == nullptr) return;
  float w[kVector];
  load_parameter<T>(p.weight, p.weight_float, v, w);
#pragma unroll
  for (int j = 0; j < kVector; ++j) s[j] *= w[j];
  if (p.bias == nullptr) return;
  load_parameter<T>(p.bias, p.weight_float, v, w);
#pragma unroll
  for (int j = 0; j < kVector; ++j) s[j] += w[j];
}

// Adds the residual to a row. The norm then sees the rounded sum, which is what the backward pass is given.
template <class T, class Shape>
__device__ __forceinline__ void add_residual(const NormParams<T>& p, int64_t row, int lane,
                                             uint4 (&raw)[Shape::kVectors]) {
  const T* add = p.residual + row * p.residual_stride;
#pragma unroll
  for (int i = 0; i < Shape::kVectors; ++i) {
    const int v = lane + i * Shape::kThreads;
    if (v >= p.vectors) continue;
    float s[kVector], r[kVector];
    to_float<T>(raw[i], s);
    to_float<T>(load_raw(add, v), r);
#pragma unroll
    for (int j = 0; j < kVector; ++j) s[j] += r[j];
    raw[i] = from_float<T>(s);
  }
}

template <class T, class Shape>
__device__ __forceinline__ void store_packed(const NormParams<T>& p, int64_t row, int lane,
                                             const uint4 (&raw)[Shape::kVectors]) {
  T* to = p.packed + row * p.packed_stride;
#pragma unroll
  for (int i = 0; i < Shape::kVectors; ++i) {
    const int v = lane + i * Shape::kThreads;
    if (v < p.vectors) store_raw(to, v, raw[i]);
  }
}

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kBlock) gather_norm_kernel(const NormParams<T> p) {
  __shared__ float2 shared[Shape::kThreads / 32];
  const int lane = threadIdx.x % Shape::kThreads;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * Shape::kRowsPerBlock + threadIdx.x / Shape::kThreads;
  if (row >= p.m) return;  // whole warps or blocks leave
  const int64_t source = p.rows == nullptr ? row : p.rows[row];
  const T* from = p.x + source * p.x_stride;

  uint4 raw[Shape::kVectors];
#pragma unroll
  for (int i = 0; i < Shape::kVectors; ++i) {
    const int v = lane + i * Shape::kThreads;
    raw[i] = source >= 0 && v < p.vectors ? load_raw(from, v) : uint4{0, 0, 0, 0};
  }
  if (p.residual != nullptr) add_residual<T, Shape>(p, row, lane, raw);
  if (p.packed != nullptr) store_packed<T, Shape>(p, row, lane, raw);

  float mean = 0.0f;
  if (p.layer) {
    float2 sum = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < Shape::kVectors; ++i) {
      float s[kVector];
      to_float<T>(raw[i], s);  // vectors beyond the row are zero
#pragma unroll
      for (const float value : s) sum.x += value;
    }
    mean = row_sum<Shape::kThreads>(sum, shared).x / static_cast<float>(p.d);
  }
  float2 squares = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < Shape::kVectors; ++i) {
    if (lane + i * Shape::kThreads >= p.vectors) continue;
    float s[kVector];
    to_float<T>(raw[i], s);
#pragma unroll
    for (const float value : s) squares.x += (value - mean) * (value - mean);
  }
  const float rstd = rsqrtf(row_sum<Shape::kThreads>(squares, shared).x / static_cast<float>(p.d) + p.eps);

  T* to = p.y + row * p.y_stride;
#pragma unroll
  for (int i = 0; i < Shape::kVectors; ++i) {
    const int v = lane + i * Shape::kThreads;
    if (v >= p.vectors) continue;
    float s[kVector];
    to_float<T>(raw[i], s);
#pragma unroll
    for (float& value : s) value = (value - mean) * rstd;
    scale_and_shift(p, v, s);
    store_raw(to, v, from_float<T>(s));
  }
}

}  // namespace

void gather_norm(const lemo_exec& exec, const lemo_gather_norm_args& a) {
  const int64_t m = a.y.shape[0], d = a.x.shape[1];
  check_parameter("weight", a.weight);
  check_parameter("bias", a.bias);
  if (m == 0 || d == 0) return;
  dispatch_dtype(a.x.dtype, [&](auto type) {
    using T = decltype(type);
    NormParams<T> p = {};
    p.x = data<T>(a.x), p.x_stride = row_stride(a.x);
    p.rows = data<int32_t>(a.rows);
    p.residual = data<T>(a.residual), p.residual_stride = present(a.residual) ? row_stride(a.residual) : 0;
    p.weight = data<void>(a.weight), p.bias = data<void>(a.bias);
    p.weight_float = present(a.weight) && a.weight.dtype == LEMO_F32;
    p.layer = a.norm == LEMO_NORM_LAYER;
    p.eps = a.eps;
    p.y = data<T>(a.y), p.y_stride = row_stride(a.y);
    p.packed = data<T>(a.packed), p.packed_stride = present(a.packed) ? row_stride(a.packed) : 0;
    p.m = m, p.vectors = static_cast<int>(d / kVector), p.d = static_cast<int>(d);
    dispatch_width("x", d, [&](auto shape) {
      using Shape = decltype(shape);
      const DeviceGuard guard(exec.device_index);
      const auto blocks = static_cast<unsigned>(ceil_div(m, Shape::kRowsPerBlock));
      gather_norm_kernel<T, Shape><<<blocks, Shape::kBlock, 0, stream_of(exec)>>>(p);
      check_launch("gather_norm");
    });
  });
}

}  // namespace lemo::cuda
