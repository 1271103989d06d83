// What the softmax of every architecture needs. Accumulator layouts keep a row in the four lanes of a quad.
#pragma once

#include <cuda_runtime.h>

#include "common/constants.h"

namespace lemo::cuda::attention {

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// A query's lse with a sink that is above -infinity, and the factor of its output.
struct WithSink {
  float lse, factor;

  __device__ __forceinline__ WithSink(float before, float sink)
      : lse(fmaxf(before, sink) + log1pf(expf(-fabsf(before - sink)))), factor(expf(before - lse)) {}
};

}  // namespace lemo::cuda::attention
