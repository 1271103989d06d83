#include "predict/pool.h"
#include "rows/rows.cuh"

namespace lemo::cuda {
namespace {

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kBlock)
    row_scale_kernel(const T* x, int64_t stride, int64_t tokens, int64_t d, bool layer, float eps, float* rstd) {
  __shared__ float2 shared[Shape::kThreads / 32];
  const int lane = threadIdx.x % Shape::kThreads;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * Shape::kRowsPerBlock + threadIdx.x / Shape::kThreads;
  if (row >= tokens) return;
  uint4 raw[Shape::kVectors];
#pragma unroll
  for (int i = 0; i < Shape::kVectors; ++i) {
    const int64_t v = lane + i * Shape::kThreads;
    raw[i] = v * kVector < d ? load_raw(x + row * stride, v) : uint4{0, 0, 0, 0};
  }
  float mean = 0.0f;
  if (layer) {
    float2 sum = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < Shape::kVectors; ++i) {
      float s[kVector];
      to_float<T>(raw[i], s);
#pragma unroll
      for (const float value : s) sum.x += value;
    }
    mean = row_sum<Shape::kThreads>(sum, shared).x / static_cast<float>(d);
  }
  float2 squares = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < Shape::kVectors; ++i) {
    if ((lane + i * Shape::kThreads) * kVector >= d) continue;
    float s[kVector];
    to_float<T>(raw[i], s);
#pragma unroll
    for (const float value : s) squares.x += (value - mean) * (value - mean);
  }
  squares = row_sum<Shape::kThreads>(squares, shared);
  if (lane == 0) rstd[row] = rsqrtf(squares.x / static_cast<float>(d) + eps);
}

constexpr int kPoolThreads = 128;

template <class T>
__global__ void __launch_bounds__(kPoolThreads)
    pool_kernel(bool maximum, const T* active, int64_t s, const float* rstd, const int32_t* offsets, int64_t first,
                int64_t count, float* pooled) {
  const int64_t block_first = offsets[blockIdx.x], block_last = offsets[blockIdx.x + 1];
  const int64_t begin = block_first > first ? block_first : first;
  const int64_t end = block_last < first + count ? block_last : first + count;
  if (begin >= end) return;
  const bool starts = begin == block_first;
  const float scale = !maximum && end == block_last ? 1.0f / static_cast<float>(block_last - block_first) : 1.0f;
  float* out = pooled + blockIdx.x * s;
  for (int64_t column = threadIdx.x; column < s; column += kPoolThreads) {
    const T* from = active + (begin - first) * s + column;
    float sum = starts ? 0.0f : out[column];  // activations are not negative, so 0 also begins a maximum
#pragma unroll 8
    for (int64_t t = begin; t < end; ++t, from += s) {
      const float value = static_cast<float>(*from) * rstd[t];
      // a NaN stays one: it has to reach the scores, where selection reports it
      sum = maximum ? (value > sum || value != value ? value : sum) : sum + value;
    }
    out[column] = sum * scale;
  }
}

// 64 x 64 tiles, 4 x 4 outputs per thread: a small product, kept in float32.
constexpr int kTile = 64;
constexpr int kDepth = 16;

template <class T>
__global__ void __launch_bounds__(256) project_kernel(const float* pooled, int64_t rows, int64_t s, const T* w3,
                                                      int64_t w3_stride, int64_t c, float* out) {
  __shared__ float a[kDepth][kTile + 1], b[kDepth][kTile + 1];
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kTile, column0 = static_cast<int64_t>(blockIdx.y) * kTile;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  float sum[4][4] = {};
  for (int64_t k0 = 0; k0 < s; k0 += kDepth) {
    for (int i = threadIdx.x; i < kTile * kDepth; i += 256) {
      const int k = i % kDepth, j = i / kDepth;
      const bool in_k = k0 + k < s;
      a[k][j] = in_k && row0 + j < rows ? pooled[(row0 + j) * s + k0 + k] : 0.0f;
      b[k][j] = in_k && column0 + j < c ? static_cast<float>(w3[(column0 + j) * w3_stride + k0 + k]) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += a[k][ty + 16 * i] * b[k][tx + 16 * j];
      }
    }
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) {
      const int64_t row = row0 + ty + 16 * i, column = column0 + tx + 16 * j;
      if (row < rows && column < c) out[row * c + column] = sum[i][j];
    }
  }
}

__global__ void copy_rows_kernel(const float* in, int64_t rows, int64_t columns, float* out, int64_t stride) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < rows * columns) out[i / columns * stride + i % columns] = in[i];
}

constexpr int kSuffixColumns = 32;
constexpr int kSegments = 32;

// Segments of a document's blocks are summed side by side, then every segment begins with what follows it.
__global__ void __launch_bounds__(kSuffixColumns* kSegments)
    suffix_kernel(const float* __restrict__ queries, const int32_t* documents, int64_t c, float* __restrict__ suffix) {
  __shared__ float sums[kSegments][kSuffixColumns];
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kSuffixColumns + threadIdx.x;
  const bool inside = column < c;
  const int64_t begin = documents[blockIdx.x], end = documents[blockIdx.x + 1];
  const int64_t length = (end - begin + kSegments - 1) / kSegments;
  const int64_t first = begin + static_cast<int64_t>(threadIdx.y) * length;
  const int64_t last = first + length < end ? first + length : end;
  float sum = 0.0f;
  if (inside) {
#pragma unroll 8
    for (int64_t n = last - 1; n >= first; --n) sum += queries[n * c + column];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (!inside) return;
  sum = 0.0f;
#pragma unroll
  for (int i = kSegments - 1; i > 0; --i) {
    if (i > static_cast<int>(threadIdx.y)) sum += sums[i][threadIdx.x];
  }
#pragma unroll 8
  for (int64_t n = last - 1; n >= first; --n) {
    sum += queries[n * c + column];
    suffix[n * c + column] = sum;
  }
}

__global__ void __launch_bounds__(128)
    dot_kernel(const float* suffix, const float* keys, const int32_t* documents, int64_t num_documents,
               int64_t num_blocks, int64_t c, bool normalize, float* scores) {
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * 128 + threadIdx.x) / 32;
  if (n >= num_blocks) return;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x % 32; i < c; i += 32) sum += suffix[n * c + i] * keys[n * c + i];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 != 0) return;
  if (normalize) {
    int64_t low = 0, high = num_documents - 1;  // the last document that starts at or before n
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (documents[middle] <= n) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    sum /= static_cast<float>(documents[low + 1] - n);
  }
  scores[n] = sum;
}

}  // namespace

void row_scale(cudaStream_t stream, const lemo_tensor& x, bool layer, float eps, float* rstd) {
  const int64_t tokens = x.shape[0], d = x.shape[1];
  if (tokens == 0) return;
  dispatch_dtype(x.dtype, [&](auto type) {
    using T = decltype(type);
    dispatch_width("x", d, [&](auto shape) {
      using Shape = decltype(shape);
      row_scale_kernel<T, Shape>
          <<<static_cast<unsigned>(ceil_div(tokens, Shape::kRowsPerBlock)), Shape::kBlock, 0, stream>>>(
              data<T>(x), row_stride(x), tokens, d, layer, eps, rstd);
    });
  });
  check_launch("predict: row scales");
}

void pool(cudaStream_t stream, const PoolArgs& args) {
  dispatch_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    pool_kernel<T><<<static_cast<unsigned>(args.num_blocks), kPoolThreads, 0, stream>>>(
        args.maximum, static_cast<const T*>(args.active), args.s, args.rstd, args.offsets, args.first, args.count,
        args.pooled);
  });
  check_launch("predict: pool");
}

void project(cudaStream_t stream, const float* pooled, int64_t num_blocks, const lemo_tensor& w3, float* out) {
  const int64_t c = w3.shape[0], s = w3.shape[1];
  const dim3 grid(static_cast<unsigned>(ceil_div(num_blocks, kTile)), static_cast<unsigned>(ceil_div(c, kTile)));
  dispatch_dtype(w3.dtype, [&](auto type) {
    using T = decltype(type);
    project_kernel<T><<<grid, 256, 0, stream>>>(pooled, num_blocks, s, data<T>(w3), row_stride(w3), c, out);
  });
  check_launch("predict: project");
}

void copy_rows(cudaStream_t stream, const float* in, int64_t rows, int64_t columns, const lemo_tensor& out) {
  copy_rows_kernel<<<static_cast<unsigned>(ceil_div(rows * columns, 256)), 256, 0, stream>>>(
      in, rows, columns, data<float>(out), out.shape[0] > 1 ? out.stride[0] : columns);
  check_launch("predict: queries, keys");
}

void column_sums(cudaStream_t stream, const ColumnSumArgs& args) {
  const dim3 grid(static_cast<unsigned>(args.num_documents), static_cast<unsigned>(ceil_div(args.c, kSuffixColumns)));
  suffix_kernel<<<grid, dim3(kSuffixColumns, kSegments), 0, stream>>>(args.queries, args.documents, args.c,
                                                                      args.suffix);
  check_launch("predict: suffix sums");
  dot_kernel<<<static_cast<unsigned>(ceil_div(args.num_blocks * 32, 128)), 128, 0, stream>>>(
      args.suffix, args.keys, args.documents, args.num_documents, args.num_blocks, args.c, args.normalize, args.scores);
  check_launch("predict: scores");
}

}  // namespace lemo::cuda
