// The soft-cap c: scores are c tanh(scale * q.k / c). Kernels keep tanh instead, and have c in the factor of the
// exponent.
#pragma once

#include <cute/tensor.hpp>

#include "common/constants.h"
#include "common/mma.cuh"

namespace lemo::cuda::attention::sm90 {

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// x and y become tanh(factor * x) and tanh(factor * y) = 1 - 2 / (1 + exp(2 factor x)), with factor2 = 2 factor
// log2(e): to 4e-7 in absolute terms, which is what scores need (tanh.approx is 5e-4 off). One reciprocal serves both,
// because the special-function units are what limits these kernels. The bound keeps the product finite, and is where
// tanh is 1.
__device__ __forceinline__ void tanh_pair(float& x, float& y, float factor2) {
  const float a = 1.0f + exp2_fast(min_nan(x * factor2, 60.0f)), b = 1.0f + exp2_fast(min_nan(y * factor2, 60.0f));
  const float both = -2.0f * reciprocal(a * b);
  x = fmaf(both, b, 1.0f);
  y = fmaf(both, a, 1.0f);
}

// q.k of elements kBegin to kEnd of an accumulator becomes tanh(scale * q.k / c).
template <int kBegin, int kEnd, class Scores>
__device__ __forceinline__ void soft_cap(Scores& s, float factor2) {
#pragma unroll
  for (int j = kBegin; j < kEnd; j += 2) tanh_pair(s(j), s(j + 1), factor2);
}

}  // namespace lemo::cuda::attention::sm90
