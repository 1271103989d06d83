// The row-wise passes around the backward kernels: delta = dout . out before them, dq from fp32 sums after them.
#pragma once

#include "attention/params.h"
#include "common/launch.h"
#include "common/sm80/mma_tile.cuh"

namespace lemo::cuda::attention::sm80 {

using namespace cuda::sm80;  // common/sm80

constexpr int kRowPassThreads = 256;
constexpr int kRowPassLanes = 8;  // threads per (row, head)
constexpr int kRowPassItems = kRowPassThreads / kRowPassLanes;

// The (packed row, head) of this group of lanes; false beyond the last row of the last document.
__device__ __forceinline__ bool locate_row(const Documents& documents, int heads, int& row, int& head) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kRowPassItems + threadIdx.x / kRowPassLanes;
  const int64_t packed_row = item / heads;
  row = static_cast<int>(packed_row);
  head = static_cast<int>(item - packed_row * heads);
  return packed_row < documents.cu_seqlens[documents.count];
}

// Also clears the sums that dq is accumulated in.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kRowPassThreads) delta_kernel(const __grid_constant__ BackwardParams params) {
  int row, head;
  const bool valid = locate_row(params.documents, params.heads, row, head);
  const int lane = threadIdx.x % kRowPassLanes;
  float sum = 0.0f;
  if (valid) {
    const int64_t storage = storage_row(params.documents, row);
    const T* dout = head_pointer<T>(params.dout, head) + storage * params.dout.row_stride;
    const T* out = head_pointer<T>(params.out, head) + storage * params.out.row_stride;
    for (int column = lane * 8; column < kHeadDim; column += kRowPassLanes * 8) {
      float a[8], b[8];
      unpack<T>(*reinterpret_cast<const uint4*>(dout + column), a);
      unpack<T>(*reinterpret_cast<const uint4*>(out + column), b);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum = fmaf(a[i], b[i], sum);
      if (params.dq_float != nullptr) {
        float4* target = reinterpret_cast<float4*>(
            params.dq_float + (static_cast<int64_t>(row) * params.heads + head) * kHeadDim + column);
        target[0] = target[1] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      }
    }
  }
#pragma unroll
  for (int mask = 1; mask < kRowPassLanes; mask *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  if (valid && lane == 0) params.delta[head * params.documents.capacity + row] = sum;
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kRowPassThreads) convert_kernel(const __grid_constant__ BackwardParams params) {
  int row, head;
  if (!locate_row(params.documents, params.heads, row, head)) return;
  const float* source = params.dq_float + (static_cast<int64_t>(row) * params.heads + head) * kHeadDim;
  T* target = head_pointer<T>(params.dq, head) + storage_row(params.documents, row) * params.dq.row_stride;
  for (int column = threadIdx.x % kRowPassLanes * 8; column < kHeadDim; column += kRowPassLanes * 8) {
    const float4 a = *reinterpret_cast<const float4*>(source + column);
    const float4 b = *reinterpret_cast<const float4*>(source + column + 4);
    const float scale = params.scale;
    *reinterpret_cast<uint4*>(target + column) =
        make_uint4(pack<T>(a.x * scale, a.y * scale), pack<T>(a.z * scale, a.w * scale),
                   pack<T>(b.x * scale, b.y * scale), pack<T>(b.z * scale, b.w * scale));
  }
}

}  // namespace lemo::cuda::attention::sm80
