#include <cmath>

#include "common/check.h"
#include "common/constants.h"
#include "common/vector.cuh"
#include "loss/softmax.h"

namespace lemo::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;

// A running log-sum-exp in base 2: maximum and sum of 2^(z log2e - maximum).
struct Running {
  float maximum = -INFINITY;
  float sum = 0.0f;
};

// With nothing but -inf so far, any finite reference gives the right sum (0) where -inf itself would give NaN.
__device__ __forceinline__ float reference(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

__device__ __forceinline__ Running merge(Running a, Running b) {
  // fmaxf drops NaNs, the sums keep them
  const float maximum = fmaxf(a.maximum, b.maximum), at = reference(maximum);
  return {maximum, a.sum * exp2f(a.maximum - at) + b.sum * exp2f(b.maximum - at)};
}

__device__ __forceinline__ Running block_merge(Running v) {
  __shared__ Running shared[kWarps];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const Running other = {__shfl_xor_sync(kFullWarp, v.maximum, offset), __shfl_xor_sync(kFullWarp, v.sum, offset)};
    v = merge(v, other);
  }
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  v = shared[threadIdx.x % 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const Running other = {__shfl_xor_sync(kFullWarp, v.maximum, offset), __shfl_xor_sync(kFullWarp, v.sum, offset)};
    v = merge(v, other);
  }
  return v;
}

template <class T>
struct Logits {
  const T* bias;
  int64_t classes;
  float softcap;

  // The logits of vector v; -inf beyond the last class.
  __device__ __forceinline__ void read(const T* row, int64_t v, float (&z)[kVector]) const {
    to_float<T>(load_raw(row, v), z);
    if (bias != nullptr || (v + 1) * kVector > classes) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const int64_t column = v * kVector + j;
        if (column >= classes) {
          z[j] = -INFINITY;
        } else if (bias != nullptr) {
          z[j] += static_cast<float>(bias[column]);
        }
      }
    }
    if (softcap > 0.0f) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        if (v * kVector + j < classes) z[j] = softcap * tanhf(z[j] / softcap);
      }
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) softmax_kernel(const SoftmaxArgs args) {
  T* row = static_cast<T*>(args.logits) + blockIdx.x * args.stride;
  const int64_t vectors = args.stride / kVector;
  const int64_t target = args.targets[blockIdx.x];
  const bool counts = target != args.ignore_index;
  const bool in_range = target >= 0 && target < args.classes;
  if (!counts || !in_range) {
    if (threadIdx.x == 0) args.losses[blockIdx.x] = counts ? NAN : 0.0f;
    if (args.gradient) {
      for (int64_t v = threadIdx.x; v < vectors; v += kThreads) store_raw(row, v, uint4{0, 0, 0, 0});
    }
    return;
  }
  const Logits<T> logits = {static_cast<const T*>(args.bias), args.classes, args.softcap};

  Running running;
#pragma unroll 4
  for (int64_t v = threadIdx.x; v < vectors; v += kThreads) {
    float z[kVector];
    logits.read(row, v, z);
    float maximum = z[0];
#pragma unroll
    for (int j = 1; j < kVector; ++j) maximum = fmaxf(maximum, z[j]);
    maximum = fmaxf(running.maximum, maximum * kLog2E);
    const float at = reference(maximum);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kVector; ++j) sum += exp2f(fmaf(z[j], kLog2E, -at));
    running.sum = running.sum * exp2f(running.maximum - at) + sum;
    running.maximum = maximum;
  }
  running = block_merge(running);

  if (threadIdx.x == 0) {
    float z[kVector];
    logits.read(row, target / kVector, z);
    float chosen = 0.0f;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      if (j == target % kVector) chosen = z[j];
    }
    args.losses[blockIdx.x] = (running.maximum + log2f(running.sum)) * kLn2 - chosen;
  }
  if (!args.gradient) return;
  __syncthreads();  // the target's logit has been read

  const float at = reference(running.maximum);
  const float scale = kGradientScale / running.sum;
#pragma unroll 4
  for (int64_t v = threadIdx.x; v < vectors; v += kThreads) {
    float z[kVector];
    logits.read(row, v, z);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      float gradient = exp2f(fmaf(z[j], kLog2E, -at)) * scale;
      if (v * kVector + j == target) gradient -= kGradientScale;
      if (args.softcap > 0.0f && v * kVector + j < args.classes) {
        const float ratio = z[j] / args.softcap;
        gradient *= 1.0f - ratio * ratio;
      }
      z[j] = gradient;
    }
    store_raw(row, v, from_float<T>(z));
  }
}

__global__ void __launch_bounds__(kThreads)
    count_kernel(const int64_t* targets, int64_t count, int64_t ignore_index, bool mean, float lora_scale,
                 int64_t* valid, LossScales* scales) {
  __shared__ int64_t shared[kWarps];
  int64_t sum = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += targets[i] != ignore_index ? 1 : 0;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullWarp, sum, offset);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0;
  for (int i = 0; i < kWarps; ++i) sum += shared[i];
  *valid = sum;
  const float gradient = 1.0f / (kGradientScale * (mean && sum > 0 ? static_cast<float>(sum) : 1.0f));
  *scales = {gradient, gradient * lora_scale};
}

__global__ void __launch_bounds__(kThreads)
    reduce_kernel(const float* losses, int64_t count, bool mean, const int64_t* valid, float* loss) {
  __shared__ double shared[kWarps];
  double sum = 0.0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += losses[i];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullWarp, sum, offset);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0.0;
  for (int i = 0; i < kWarps; ++i) sum += shared[i];
  if (mean && *valid > 0) sum /= static_cast<double>(*valid);
  *loss = static_cast<float>(sum);
}

// A thread per vector of columns walks all rows.
template <class T>
__global__ void __launch_bounds__(128) columns_kernel(const T* gradients, int64_t rows, int64_t classes, int64_t stride,
                                                      const LossScales* scales, bool accumulate, float* sums) {
  const int64_t v = static_cast<int64_t>(blockIdx.x) * 128 + threadIdx.x;
  if (v * kVector >= classes) return;
  float sum[kVector] = {};
#pragma unroll 4
  for (int64_t row = 0; row < rows; ++row) {
    float g[kVector];
    to_float<T>(load_raw(gradients + row * stride, v), g);
#pragma unroll
    for (int j = 0; j < kVector; ++j) sum[j] += g[j];
  }
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    const int64_t column = v * kVector + j;
    if (column < classes) sums[column] = (accumulate ? sums[column] : 0.0f) + scales->gradient * sum[j];
  }
}

}  // namespace

void count_valid(cudaStream_t stream, const int64_t* targets, int64_t count, int64_t ignore_index, bool mean,
                 float lora_scale, int64_t* valid, LossScales* scales) {
  count_kernel<<<1, kThreads, 0, stream>>>(targets, count, ignore_index, mean, lora_scale, valid, scales);
  check_launch("linear_cross_entropy: valid targets");
}

void softmax_loss(cudaStream_t stream, const SoftmaxArgs& args) {
  dispatch_dtype(args.dtype, [&](auto type) {
    softmax_kernel<decltype(type)><<<static_cast<unsigned>(args.rows), kThreads, 0, stream>>>(args);
  });
  check_launch("linear_cross_entropy: softmax");
}

void sum_columns(cudaStream_t stream, const SoftmaxArgs& args, const LossScales* scales, bool accumulate, float* sums) {
  dispatch_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    const auto blocks = static_cast<unsigned>(ceil_div(ceil_div(args.classes, kVector), 128));
    columns_kernel<T><<<blocks, 128, 0, stream>>>(static_cast<const T*>(args.logits), args.rows, args.classes,
                                                  args.stride, scales, accumulate, sums);
  });
  check_launch("linear_cross_entropy: dbias");
}

void reduce_loss(cudaStream_t stream, const float* losses, int64_t count, bool mean, const int64_t* valid,
                 float* loss) {
  reduce_kernel<<<1, kThreads, 0, stream>>>(losses, count, mean, valid, loss);
  check_launch("linear_cross_entropy: loss");
}

}  // namespace lemo::cuda
