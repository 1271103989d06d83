// gather and scatter_add: rows copied from, and added to, their original offsets.
#include "kernels.h"
#include "rows/rows.cuh"

namespace lemo::cuda {
namespace {

constexpr int kChunk = 4;  // vectors per lane

template <class T>
struct GatherParams {
  const T* x;
  int64_t x_stride;
  const int32_t* rows;   // or null: every row
  const float* weights;  // or null: every weight is 1
  const int32_t* slots;
  T* out;
  int64_t out_stride;
  int64_t m, vectors, chunks;
};

template <class T>
__global__ void __launch_bounds__(kRowBlock) gather_kernel(const GatherParams<T> p) {
  const Place at = place<kChunk>(p.chunks);
  if (at.row >= p.m) return;
  const int64_t source = p.rows == nullptr ? at.row : p.rows[at.row];
  T* to = p.out + at.row * p.out_stride;
  const T* from = p.x + source * p.x_stride;
  uint4 raw[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const int64_t v = at.first + i * kLanes;
    raw[i] = source >= 0 && v < p.vectors ? load_raw(from, v) : uint4{0, 0, 0, 0};
  }
  const float weight = p.weights != nullptr && source >= 0 ? p.weights[p.slots[at.row]] : 1.0f;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const int64_t v = at.first + i * kLanes;
    if (v >= p.vectors) continue;
    if (p.weights != nullptr) {
      float values[kVector];
      to_float<T>(raw[i], values);
#pragma unroll
      for (float& value : values) value *= weight;
      raw[i] = from_float<T>(values);
    }
    store_raw(to, v, raw[i]);
  }
}

template <class T>
struct ScatterAddParams {
  T* x;
  int64_t x_stride;
  const int32_t* rows;  // or null: every row
  const T* y;
  int64_t y_stride;
  const T* base;  // [m, d] that y is added to; null: the rows of x
  int64_t base_stride;
  int64_t m, vectors, chunks;
};

template <class T>
__global__ void __launch_bounds__(kRowBlock) scatter_add_kernel(const ScatterAddParams<T> p) {
  const Place at = place<kChunk>(p.chunks);
  if (at.row >= p.m) return;
  const int64_t target = p.rows == nullptr ? at.row : p.rows[at.row];
  if (target < 0) return;
  T* to = p.x + target * p.x_stride;
  const T* from = p.base != nullptr ? p.base + at.row * p.base_stride : to;
  const T* add = p.y + at.row * p.y_stride;
  uint4 a[kChunk], b[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const int64_t v = at.first + i * kLanes;
    if (v >= p.vectors) continue;
    a[i] = load_raw(from, v);
    b[i] = load_raw(add, v);
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const int64_t v = at.first + i * kLanes;
    if (v >= p.vectors) continue;
    float sum[kVector], other[kVector];
    to_float<T>(a[i], sum);
    to_float<T>(b[i], other);
#pragma unroll
    for (int j = 0; j < kVector; ++j) sum[j] += other[j];
    store_raw(to, v, from_float<T>(sum));
  }
}

}  // namespace

void gather(const lemo_exec& exec, const lemo_gather_args& a) {
  const int64_t m = a.out.shape[0];
  const Grid grid = grid_for<kChunk>("x", m, a.x.shape[1]);
  if (grid.blocks == 0) return;
  const DeviceGuard guard(exec.device_index);
  dispatch_dtype(a.x.dtype, [&](auto type) {
    using T = decltype(type);
    gather_kernel<T><<<grid.blocks, kRowBlock, 0, stream_of(exec)>>>(
        {data<T>(a.x), row_stride(a.x), data<int32_t>(a.rows), data<float>(a.weights), data<int32_t>(a.slots),
         data<T>(a.out), row_stride(a.out), m, grid.vectors, grid.chunks});
  });
  check_launch("gather");
}

void scatter_add(const lemo_exec& exec, const lemo_scatter_add_args& a) {
  const int64_t m = a.y.shape[0];
  const Grid grid = grid_for<kChunk>("x", m, a.x.shape[1]);
  if (grid.blocks == 0) return;
  const DeviceGuard guard(exec.device_index);
  dispatch_dtype(a.x.dtype, [&](auto type) {
    using T = decltype(type);
    scatter_add_kernel<T><<<grid.blocks, kRowBlock, 0, stream_of(exec)>>>(
        {data<T>(a.x), row_stride(a.x), data<int32_t>(a.rows), data<T>(a.y), row_stride(a.y), data<T>(a.base),
         present(a.base) ? row_stride(a.base) : 0, m, grid.vectors, grid.chunks});
  });
  check_launch("scatter_add");
}

}  // namespace lemo::cuda
