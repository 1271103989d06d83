// 16-byte vectors of half-precision numbers, fp32 arithmetic, and reductions over a warp or a thread block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "src/backend.h"

namespace lemo::cuda {

constexpr int kVector = 8;  // elements in 16 bytes
constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ float2 unpack(uint32_t bits, __nv_bfloat16) {
  return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
}
__device__ __forceinline__ float2 unpack(uint32_t bits, __half) {
  return __half22float2(*reinterpret_cast<const __half2*>(&bits));
}
__device__ __forceinline__ uint32_t pack(float2 v, __nv_bfloat16) {
  const __nv_bfloat162 packed = __float22bfloat162_rn(v);
  return *reinterpret_cast<const uint32_t*>(&packed);
}
__device__ __forceinline__ uint32_t pack(float2 v, __half) {
  const __half2 packed = __float22half2_rn(v);
  return *reinterpret_cast<const uint32_t*>(&packed);
}

// Vector number `index` of a row.
template <class T>
__device__ __forceinline__ uint4 load_raw(const T* row, int64_t index) {
  return reinterpret_cast<const uint4*>(row)[index];
}
template <class T>
__device__ __forceinline__ void store_raw(T* row, int64_t index, uint4 raw) {
  reinterpret_cast<uint4*>(row)[index] = raw;
}

template <class T>
__device__ __forceinline__ void to_float(uint4 raw, float (&v)[kVector]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack(words[i], T{});
    v[2 * i] = pair.x;
    v[2 * i + 1] = pair.y;
  }
}
template <class T>
__device__ __forceinline__ uint4 from_float(const float (&v)[kVector]) {
  return {pack({v[0], v[1]}, T{}), pack({v[2], v[3]}, T{}), pack({v[4], v[5]}, T{}), pack({v[6], v[7]}, T{})};
}

// A parameter vector in T or in fp32 (decided at run time; the branch is uniform).
template <class T>
__device__ __forceinline__ void load_parameter(const void* data, bool is_float, int64_t index, float (&v)[kVector]) {
  if (is_float) {
    const float4 lo = reinterpret_cast<const float4*>(data)[2 * index];
    const float4 hi = reinterpret_cast<const float4*>(data)[2 * index + 1];
    v[0] = lo.x, v[1] = lo.y, v[2] = lo.z, v[3] = lo.w;
    v[4] = hi.x, v[5] = hi.y, v[6] = hi.z, v[7] = hi.w;
  } else {
    to_float<T>(load_raw(static_cast<const T*>(data), index), v);
  }
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(kFullWarp, v, offset);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v = fmaxf(v, __shfl_xor_sync(kFullWarp, v, offset));
  return v;
}

// Two sums over the kThreads consecutive threads that share a row: a warp, or the whole block. Every thread gets them.
template <int kThreads>
__device__ __forceinline__ float2 row_sum(float2 v, float2* shared) {
  v = {warp_sum(v.x), warp_sum(v.y)};
  if constexpr (kThreads > 32) {
    constexpr int kWarps = kThreads / 32;
    __syncthreads();  // the previous use of `shared` is over
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
    __syncthreads();
    v = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      v.x += shared[i].x;
      v.y += shared[i].y;
    }
  }
  return v;
}

// Calls f with a value of the element type that `dtype` names.
template <class Function>
void dispatch_dtype(int32_t dtype, Function&& f) {
  if (dtype == LEMO_BF16) {
    f(__nv_bfloat16{});
  } else if (dtype == LEMO_F16) {
    f(__half{});
  } else {
    throw Error(LEMO_UNSUPPORTED, "expected float16 or bfloat16 tensors on CUDA");
  }
}

}  // namespace lemo::cuda
