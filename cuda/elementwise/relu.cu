// relu, with a bit for every element, and relu_backward from these bits.
#include "kernels.h"
#include "rows/rows.cuh"

namespace lemo::cuda {
namespace {

constexpr int kChunk = 4;  // vectors per lane
// The bits of a vector are one byte.
static_assert(kVector == 8, "a byte holds the bits of a vector");

template <class T>
struct ReluParams {
  const T* in;
  int64_t in_stride;
  uint8_t* bits;
  int64_t bits_stride;
  T* out;
  int64_t out_stride;
  int64_t m, vectors, chunks;
};

// `out` may be `in`, in both kernels: a vector is read before it is written.
template <class T>
__global__ void __launch_bounds__(kRowBlock) relu_kernel(const ReluParams<T> p) {
  const Place at = place<kChunk>(p.chunks);
  if (at.row >= p.m) return;
  const T* in = p.in + at.row * p.in_stride;
  T* out = p.out + at.row * p.out_stride;
  uint8_t* bits = p.bits + at.row * p.bits_stride;
  uint4 raw[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const int64_t v = at.first + i * kLanes;
    if (v < p.vectors) raw[i] = load_raw(in, v);
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const int64_t v = at.first + i * kLanes;
    if (v >= p.vectors) continue;
    float z[kVector];
    to_float<T>(raw[i], z);
    unsigned byte = 0;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const bool passes = !(z[j] <= 0.0f);
      z[j] = passes ? z[j] : 0.0f;
      byte |= static_cast<unsigned>(passes) << j;
    }
    store_raw(out, v, from_float<T>(z));
    bits[v] = static_cast<uint8_t>(byte);
  }
}

template <class T>
__global__ void __launch_bounds__(kRowBlock) relu_backward_kernel(const ReluParams<T> p) {
  const Place at = place<kChunk>(p.chunks);
  if (at.row >= p.m) return;
  const T* in = p.in + at.row * p.in_stride;
  T* out = p.out + at.row * p.out_stride;
  const uint8_t* bits = p.bits + at.row * p.bits_stride;
  uint4 raw[kChunk];
  unsigned byte[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const int64_t v = at.first + i * kLanes;
    if (v >= p.vectors) continue;
    raw[i] = load_raw(in, v);
    byte[i] = bits[v];
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const int64_t v = at.first + i * kLanes;
    if (v >= p.vectors) continue;
    float d[kVector];
    to_float<T>(raw[i], d);
#pragma unroll
    for (int j = 0; j < kVector; ++j) d[j] = (byte[i] >> j & 1u) != 0 ? d[j] : 0.0f;
    store_raw(out, v, from_float<T>(d));
  }
}

}  // namespace

void relu(const lemo_exec& exec, const lemo_relu_args& a) {
  const int64_t m = a.x.shape[0];
  const Grid grid = grid_for<kChunk>("x", m, a.x.shape[1]);
  if (grid.blocks == 0) return;
  const DeviceGuard guard(exec.device_index);
  dispatch_dtype(a.x.dtype, [&](auto type) {
    using T = decltype(type);
    relu_kernel<T><<<grid.blocks, kRowBlock, 0, stream_of(exec)>>>(
        {data<T>(a.x), row_stride(a.x), data<uint8_t>(a.bits), row_stride(a.bits), data<T>(a.out), row_stride(a.out), m,
         grid.vectors, grid.chunks});
  });
  check_launch("relu");
}

void relu_backward(const lemo_exec& exec, const lemo_relu_backward_args& a) {
  const int64_t m = a.dout.shape[0];
  const Grid grid = grid_for<kChunk>("dout", m, a.dout.shape[1]);
  if (grid.blocks == 0) return;
  const DeviceGuard guard(exec.device_index);
  dispatch_dtype(a.dout.dtype, [&](auto type) {
    using T = decltype(type);
    relu_backward_kernel<T><<<grid.blocks, kRowBlock, 0, stream_of(exec)>>>(
        {data<T>(a.dout), row_stride(a.dout), data<uint8_t>(a.bits), row_stride(a.bits), data<T>(a.dx),
         row_stride(a.dx), m, grid.vectors, grid.chunks});
  });
  check_launch("relu_backward");
}

}  // namespace lemo::cuda
