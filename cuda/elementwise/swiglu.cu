// swiglu and swiglu_backward.
#include "kernels.h"
#include "rows/rows.cuh"

namespace lemo::cuda {
namespace {

// Vectors per lane of each operand.
constexpr int kForwardChunk = 4;
constexpr int kBackwardChunk = 2;

// 1 / (1 + exp(-z)). Approximate exponential and division: their error, of at most 2e-5 of the result, is far below the
// rounding to half precision.
__device__ __forceinline__ float sigmoid(float z) { return __fdividef(1.0f, 1.0f + __expf(-z)); }

template <class T>
struct SwigluParams {
  const T *gate, *up;
  int64_t gate_stride, up_stride;
  T* out;
  int64_t out_stride;
  int64_t m, vectors, chunks;
};

// Outputs may be inputs, here and in the backward pass: a vector is read before it is written.
template <class T>
__global__ void __launch_bounds__(kRowBlock) swiglu_kernel(const SwigluParams<T> p) {
  const Place at = place<kForwardChunk>(p.chunks);
  if (at.row >= p.m) return;
  const T *gate = p.gate + at.row * p.gate_stride, *up = p.up + at.row * p.up_stride;
  T* out = p.out + at.row * p.out_stride;
  uint4 a[kForwardChunk], b[kForwardChunk];
#pragma unroll
  for (int i = 0; i < kForwardChunk; ++i) {
    const int64_t v = at.first + i * kLanes;
    if (v >= p.vectors) continue;
    a[i] = load_raw(gate, v);
    b[i] = load_raw(up, v);
  }
#pragma unroll
  for (int i = 0; i < kForwardChunk; ++i) {
    const int64_t v = at.first + i * kLanes;
    if (v >= p.vectors) continue;
    float z[kVector], u[kVector];
    to_float<T>(a[i], z);
    to_float<T>(b[i], u);
#pragma unroll
    for (int j = 0; j < kVector; ++j) u[j] *= z[j] * sigmoid(z[j]);
    store_raw(out, v, from_float<T>(u));
  }
}

template <class T>
struct SwigluBackwardParams {
  const T *dout, *gate, *up;
  int64_t dout_stride, gate_stride, up_stride;
  T *dgate, *dup;
  int64_t dgate_stride, dup_stride;
  int64_t m, vectors, chunks;
};

template <class T>
__global__ void __launch_bounds__(kRowBlock) swiglu_backward_kernel(const SwigluBackwardParams<T> p) {
  const Place at = place<kBackwardChunk>(p.chunks);
  if (at.row >= p.m) return;
  const T* dout = p.dout + at.row * p.dout_stride;
  const T *gate = p.gate + at.row * p.gate_stride, *up = p.up + at.row * p.up_stride;
  T *dgate = p.dgate + at.row * p.dgate_stride, *dup = p.dup + at.row * p.dup_stride;
  uint4 a[kBackwardChunk], b[kBackwardChunk], c[kBackwardChunk];
#pragma unroll
  for (int i = 0; i < kBackwardChunk; ++i) {
    const int64_t v = at.first + i * kLanes;
    if (v >= p.vectors) continue;
    a[i] = load_raw(dout, v);
    b[i] = load_raw(gate, v);
    c[i] = load_raw(up, v);
  }
#pragma unroll
  for (int i = 0; i < kBackwardChunk; ++i) {
    const int64_t v = at.first + i * kLanes;
    if (v >= p.vectors) continue;
    float d[kVector], z[kVector], u[kVector];
    to_float<T>(a[i], d);
    to_float<T>(b[i], z);
    to_float<T>(c[i], u);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float s = sigmoid(z[j]);
      u[j] = d[j] * u[j] * (s * (1.0f + z[j] * (1.0f - s)));
      d[j] = d[j] * (z[j] * s);
    }
    store_raw(dgate, v, from_float<T>(u));
    store_raw(dup, v, from_float<T>(d));
  }
}

}  // namespace

void swiglu(const lemo_exec& exec, const lemo_swiglu_args& a) {
  const int64_t m = a.gate.shape[0];
  const Grid grid = grid_for<kForwardChunk>("gate", m, a.gate.shape[1]);
  if (grid.blocks == 0) return;
  const DeviceGuard guard(exec.device_index);
  dispatch_dtype(a.gate.dtype, [&](auto type) {
    using T = decltype(type);
    swiglu_kernel<T><<<grid.blocks, kRowBlock, 0, stream_of(exec)>>>(
        {data<T>(a.gate), data<T>(a.up), row_stride(a.gate), row_stride(a.up), data<T>(a.out), row_stride(a.out), m,
         grid.vectors, grid.chunks});
  });
  check_launch("swiglu");
}

void swiglu_backward(const lemo_exec& exec, const lemo_swiglu_backward_args& a) {
  const int64_t m = a.dout.shape[0];
  const Grid grid = grid_for<kBackwardChunk>("dout", m, a.dout.shape[1]);
  if (grid.blocks == 0) return;
  const DeviceGuard guard(exec.device_index);
  dispatch_dtype(a.dout.dtype, [&](auto type) {
    using T = decltype(type);
    swiglu_backward_kernel<T><<<grid.blocks, kRowBlock, 0, stream_of(exec)>>>(
        {data<T>(a.dout), data<T>(a.gate), data<T>(a.up), row_stride(a.dout), row_stride(a.gate), row_stride(a.up),
         data<T>(a.dgate), data<T>(a.dup), row_stride(a.dgate), row_stride(a.dup), m, grid.vectors, grid.chunks});
  });
  check_launch("swiglu_backward");
}

}  // namespace lemo::cuda
