// rotary: the pairs (j, j + D / 2) of every head, rotated by the angles of the row's position.
#include <type_traits>

#include "kernels.h"
#include "rows/rows.cuh"

namespace lemo::cuda {
namespace {

constexpr int kBlock = 128;
// Heads of a thread: they share its angles, and their loads are in flight together.
constexpr int kHeads = 4;

template <class T>
struct RotaryParams {
  const T* x;
  int64_t x_row, x_head;
  const void *cos, *sin;
  int64_t cos_row, sin_row;
  bool table_float;
  const int32_t* rows;  // or null: row i of the tables
  T* out;
  int64_t out_row, out_head;
  int64_t m;
  int heads, groups;  // a thread takes heads g, g + groups, ...
  int half, pieces;   // of kWidth pairs
  float sign;
};

// kWidth neighboring elements: a vector, or a single one for heads that vectors do not divide.
template <class T, int kWidth>
using Raw = std::conditional_t<kWidth == 1, T, uint4>;

template <class T>
__device__ __forceinline__ void widen(uint4 raw, float (&v)[kVector]) {
  to_float<T>(raw, v);
}
template <class T>
__device__ __forceinline__ void widen(T raw, float (&v)[1]) {
  v[0] = static_cast<float>(raw);
}
template <class T>
__device__ __forceinline__ uint4 narrow(const float (&v)[kVector]) {
  return from_float<T>(v);
}
template <class T>
__device__ __forceinline__ T narrow(const float (&v)[1]) {
  return static_cast<T>(v[0]);
}

// Elements from j on of row `from` of a table.
template <class T, int kWidth>
__device__ __forceinline__ void load_angles(const void* table, bool is_float, int64_t at, float (&v)[kWidth]) {
  if constexpr (kWidth == kVector) {
    const void* start = is_float ? static_cast<const void*>(static_cast<const float*>(table) + at)
                                 : static_cast<const void*>(static_cast<const T*>(table) + at);
    load_parameter<T>(start, is_float, 0, v);
  } else {
    v[0] = is_float ? static_cast<const float*>(table)[at] : static_cast<float>(static_cast<const T*>(table)[at]);
  }
}

// In place if out is x: a thread has read both elements of its pairs before it writes them.
template <class T, int kWidth>
__global__ void __launch_bounds__(kBlock) rotary_kernel(const RotaryParams<T> p) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  const int64_t unit = item / p.pieces;
  const int64_t row = unit / p.groups;
  if (row >= p.m) return;
  const int first = static_cast<int>(unit - row * p.groups);
  const int j = static_cast<int>(item - unit * p.pieces) * kWidth;
  const T* x = p.x + row * p.x_row + j;
  Raw<T, kWidth> low[kHeads] = {}, high[kHeads] = {};
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int head = first + i * p.groups;
    if (head >= p.heads) continue;
    low[i] = *reinterpret_cast<const Raw<T, kWidth>*>(x + head * p.x_head);
    high[i] = *reinterpret_cast<const Raw<T, kWidth>*>(x + head * p.x_head + p.half);
  }
  const int64_t from = p.rows == nullptr ? row : p.rows[row];
  float cos[kWidth] = {}, sin[kWidth] = {};
  if (from >= 0) {
    load_angles<T, kWidth>(p.cos, p.table_float, from * p.cos_row + j, cos);
    load_angles<T, kWidth>(p.sin, p.table_float, from * p.sin_row + j, sin);
  }
  T* out = p.out + row * p.out_row + j;
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int head = first + i * p.groups;
    if (head >= p.heads) continue;
    float u[kWidth], v[kWidth];
    widen<T>(low[i], u);
    widen<T>(high[i], v);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float a = u[k], b = v[k], s = p.sign * sin[k];
      u[k] = from < 0 ? 0.0f : a * cos[k] - b * s;  // padding may hold NaN
      v[k] = from < 0 ? 0.0f : b * cos[k] + a * s;
    }
    *reinterpret_cast<Raw<T, kWidth>*>(out + head * p.out_head) = narrow<T>(u);
    *reinterpret_cast<Raw<T, kWidth>*>(out + head * p.out_head + p.half) = narrow<T>(v);
  }
}

// Whether rows of a table can be read a vector at a time: for half-precision ones that has been checked.
bool aligned(const lemo_tensor& table) {
  if (table.dtype != LEMO_F32) return true;
  return reinterpret_cast<uintptr_t>(table.data) % 16 == 0 && (table.shape[0] <= 1 || table.stride[0] % 4 == 0);
}

}  // namespace

void rotary(const lemo_exec& exec, const lemo_rotary_args& a) {
  const int64_t m = a.x.shape[0], heads = a.x.shape[1], half = a.x.shape[2] / 2;
  if (m == 0 || heads == 0 || half == 0) return;
  dispatch_dtype(a.x.dtype, [&](auto type) {
    using T = decltype(type);
    const bool wide = half % kVector == 0 && aligned(a.cos) && aligned(a.sin);
    RotaryParams<T> p = {};
    p.x = data<T>(a.x), p.x_row = a.x.stride[0], p.x_head = a.x.stride[1];
    p.cos = data<void>(a.cos), p.cos_row = a.cos.stride[0];
    p.sin = data<void>(a.sin), p.sin_row = a.sin.stride[0];
    p.table_float = a.cos.dtype == LEMO_F32;
    p.rows = data<int32_t>(a.rows);
    p.out = data<T>(a.out), p.out_row = a.out.stride[0], p.out_head = a.out.stride[1];
    p.m = m, p.heads = static_cast<int>(heads), p.groups = static_cast<int>(ceil_div(heads, kHeads));
    p.half = static_cast<int>(half), p.pieces = static_cast<int>(wide ? half / kVector : half);
    p.sign = a.inverse != 0 ? -1.0f : 1.0f;
    const unsigned blocks = block_count("x", ceil_div(m * p.groups * p.pieces, kBlock));
    const DeviceGuard guard(exec.device_index);
    const auto kernel = wide ? rotary_kernel<T, kVector> : rotary_kernel<T, 1>;
    kernel<<<blocks, kBlock, 0, stream_of(exec)>>>(p);
  });
  check_launch("rotary");
}

}  // namespace lemo::cuda
