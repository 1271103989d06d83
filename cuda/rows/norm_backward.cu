// gather_norm_backward: the gradient at the rows' original offsets, and the gradients of weight and bias.
#include "kernels.h"
#include "rows/rows.cuh"

namespace lemo::cuda {
namespace {

// Row groups whose partial sums of dweight and dbias lie in the workspace: enough to fill a device of 132
// multiprocessors (a row takes a warp up to d = 1024, a block beyond), and a function of shapes alone, so that the
// order of summation is fixed.
constexpr int64_t kWarpGroups = 16 * 132, kBlockGroups = 4 * 132;
int64_t partial_groups(int64_t m, int64_t d) {
  const int64_t most = d <= 1024 ? kWarpGroups : kBlockGroups;
  return m < most ? m : most;
}

template <class T>
struct NormBackwardParams {
  const T* dy;
  int64_t dy_stride;
  const T* s;
  int64_t s_stride;
  const void* weight;
  bool weight_float;
  const T* ds_extra;
  int64_t ds_extra_stride;
  const int32_t* rows;
  bool layer;
  bool accumulate;
  float eps;
  T* dx;
  int64_t dx_stride;
  float* dweight;  // [groups, d] partial sums
  float* dbias;
  int64_t m, vectors, d;
  int64_t groups;
};

template <class T, class Shape, bool kParameters>
__global__ void __launch_bounds__(Shape::kBlock) norm_backward_kernel(const NormBackwardParams<T> p) {
  __shared__ float2 shared[Shape::kThreads / 32];
  const int lane = threadIdx.x % Shape::kThreads;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * Shape::kRowsPerBlock + threadIdx.x / Shape::kThreads;
  if (group >= p.groups) return;
  const float inverse_d = 1.0f / static_cast<float>(p.d);

  float dweight[kParameters ? Shape::kVectors : 1][kVector] = {};
  float dbias[kParameters ? Shape::kVectors : 1][kVector] = {};

  for (int64_t row = group; row < p.m; row += p.groups) {
    const T* s_row = p.s + row * p.s_stride;
    const T* dy_row = p.dy + row * p.dy_stride;
    uint4 s_raw[Shape::kVectors], dy_raw[Shape::kVectors];
    float2 sum = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < Shape::kVectors; ++i) {
      const int64_t v = lane + i * Shape::kThreads;
      s_raw[i] = v < p.vectors ? load_raw(s_row, v) : uint4{0, 0, 0, 0};
      dy_raw[i] = v < p.vectors ? load_raw(dy_row, v) : uint4{0, 0, 0, 0};
    }
    float mean = 0.0f;
    if (p.layer) {
#pragma unroll
      for (int i = 0; i < Shape::kVectors; ++i) {
        float s[kVector];
        to_float<T>(s_raw[i], s);
#pragma unroll
        for (const float value : s) sum.x += value;
      }
      mean = row_sum<Shape::kThreads>(sum, shared).x * inverse_d;
    }
    sum = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < Shape::kVectors; ++i) {
      if (lane + i * Shape::kThreads >= p.vectors) continue;
      float s[kVector];
      to_float<T>(s_raw[i], s);
#pragma unroll
      for (const float value : s) sum.x += (value - mean) * (value - mean);
    }
    const float rstd = rsqrtf(row_sum<Shape::kThreads>(sum, shared).x * inverse_d + p.eps);

    // g = dy * weight; the row's sums of g and of g * xhat
    sum = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < Shape::kVectors; ++i) {
      const int64_t v = lane + i * Shape::kThreads;
      if (v >= p.vectors) continue;
      float s[kVector], g[kVector], w[kVector];
      to_float<T>(s_raw[i], s);
      to_float<T>(dy_raw[i], g);
#pragma unroll
      for (int j = 0; j < kVector; ++j) w[j] = 1.0f;
      if (p.weight != nullptr) load_parameter<T>(p.weight, p.weight_float, v, w);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const float xhat = (s[j] - mean) * rstd;
        if constexpr (kParameters) {
          dweight[i][j] += g[j] * xhat;
          dbias[i][j] += g[j];
        }
        const float scaled = g[j] * w[j];
        sum.x += scaled;
        sum.y += scaled * xhat;
      }
    }
    sum = row_sum<Shape::kThreads>(sum, shared);
    const float mean_g = p.layer ? sum.x * inverse_d : 0.0f;
    const float mean_gx = sum.y * inverse_d;

    const int64_t target = p.rows == nullptr ? row : p.rows[row];
    if (target < 0) continue;
    T* to = p.dx + target * p.dx_stride;
#pragma unroll
    for (int i = 0; i < Shape::kVectors; ++i) {
      const int64_t v = lane + i * Shape::kThreads;
      if (v >= p.vectors) continue;
      float s[kVector], g[kVector], w[kVector];
      to_float<T>(s_raw[i], s);
      to_float<T>(dy_raw[i], g);
#pragma unroll
      for (int j = 0; j < kVector; ++j) w[j] = 1.0f;
      if (p.weight != nullptr) load_parameter<T>(p.weight, p.weight_float, v, w);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        g[j] = rstd * (g[j] * w[j] - mean_g - (s[j] - mean) * rstd * mean_gx);
      }
      if (p.ds_extra != nullptr) {
        to_float<T>(load_raw(p.ds_extra + row * p.ds_extra_stride, v), s);
#pragma unroll
        for (int j = 0; j < kVector; ++j) g[j] += s[j];
      }
      if (p.accumulate) {
        to_float<T>(load_raw(to, v), s);
#pragma unroll
        for (int j = 0; j < kVector; ++j) g[j] += s[j];
      }
      store_raw(to, v, from_float<T>(g));
    }
  }

  if constexpr (kParameters) {
#pragma unroll
    for (int i = 0; i < Shape::kVectors; ++i) {
      const int64_t v = lane + i * Shape::kThreads;
      if (v >= p.vectors) continue;
      const int64_t at = group * p.d + v * kVector;
      for (int half = 0; half < 2; ++half) {
        const float* w = dweight[i] + 4 * half;
        const float* b = dbias[i] + 4 * half;
        *reinterpret_cast<float4*>(p.dweight + at + 4 * half) = {w[0], w[1], w[2], w[3]};
        *reinterpret_cast<float4*>(p.dbias + at + 4 * half) = {b[0], b[1], b[2], b[3]};
      }
    }
  }
}

constexpr int kSumRows = 32;

// Sums the partials of 32 columns: kSumRows rows of threads take every so many groups, then add up in a fixed order.
__global__ void __launch_bounds__(32 * kSumRows)
    sum_partials_kernel(const float* dweight, const float* dbias, int64_t groups, int64_t d, float* dweight_out,
                        float* dbias_out) {
  __shared__ float2 shared[kSumRows][32];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  float2 sum = {0.0f, 0.0f};
  if (column < d) {
#pragma unroll 4
    for (int64_t group = threadIdx.y; group < groups; group += kSumRows) {
      sum.x += dweight[group * d + column];
      sum.y += dbias[group * d + column];
    }
  }
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= d) return;
  for (int i = 1; i < kSumRows; ++i) {
    sum.x += shared[i][threadIdx.x].x;
    sum.y += shared[i][threadIdx.x].y;
  }
  if (dweight_out != nullptr) dweight_out[column] = sum.x;
  if (dbias_out != nullptr) dbias_out[column] = sum.y;
}

struct Workspace {
  float* dweight;
  float* dbias;
  uint64_t bytes;
};

Workspace layout(const lemo_gather_norm_backward_args& a, void* base) {
  if (!present(a.dweight) && !present(a.dbias)) return {};
  const Size size = Size(partial_groups(a.dy.shape[0], a.dy.shape[1])) * a.dy.shape[1];
  Arena arena(base);
  Workspace w = {};
  w.dweight = arena.take<float>(size);
  w.dbias = arena.take<float>(size);
  w.bytes = arena.size();
  return w;
}

}  // namespace

uint64_t gather_norm_backward_workspace(const lemo_exec&, const lemo_gather_norm_backward_args& a) {
  return layout(a, nullptr).bytes;
}

void gather_norm_backward(const lemo_exec& exec, const lemo_gather_norm_backward_args& a) {
  const int64_t m = a.dy.shape[0], d = a.dy.shape[1];
  check_parameter("weight", a.weight);
  const bool parameters = present(a.dweight) || present(a.dbias);
  const Workspace workspace = layout(a, exec.workspace);
  if (d == 0 || (m == 0 && !parameters)) return;
  const int64_t groups = parameters ? partial_groups(m, d) : m;
  dispatch_dtype(a.dy.dtype, [&](auto type) {
    using T = decltype(type);
    NormBackwardParams<T> p = {};
    p.dy = data<T>(a.dy), p.dy_stride = row_stride(a.dy);
    p.s = data<T>(a.s), p.s_stride = row_stride(a.s);
    p.weight = data<void>(a.weight);
    p.weight_float = present(a.weight) && a.weight.dtype == LEMO_F32;
    p.ds_extra = data<T>(a.ds_extra), p.ds_extra_stride = present(a.ds_extra) ? row_stride(a.ds_extra) : 0;
    p.rows = data<int32_t>(a.rows);
    p.layer = a.norm == LEMO_NORM_LAYER;
    p.accumulate = a.accumulate != 0;
    p.eps = a.eps;
    p.dx = data<T>(a.dx), p.dx_stride = row_stride(a.dx);
    p.dweight = workspace.dweight, p.dbias = workspace.dbias;
    p.m = m, p.vectors = d / kVector, p.d = d, p.groups = groups;
    dispatch_width("dy", d, [&](auto shape) {
      using Shape = decltype(shape);
      const DeviceGuard guard(exec.device_index);
      const auto blocks = static_cast<unsigned>(ceil_div(groups, Shape::kRowsPerBlock));
      if (blocks > 0) {
        const auto kernel = parameters ? norm_backward_kernel<T, Shape, true> : norm_backward_kernel<T, Shape, false>;
        kernel<<<blocks, Shape::kBlock, 0, stream_of(exec)>>>(p);
        check_launch("gather_norm_backward");
      }
      if (parameters) {
        sum_partials_kernel<<<static_cast<unsigned>(ceil_div(d, 32)), dim3(32, kSumRows), 0, stream_of(exec)>>>(
            workspace.dweight, workspace.dbias, groups, d, data<float>(a.dweight), data<float>(a.dbias));
        check_launch("gather_norm_backward: dweight, dbias");
      }
    });
  });
}

}  // namespace lemo::cuda
