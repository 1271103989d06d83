// Sinks: a logit for each head that joins the denominator of the softmax only. Most attention kernels know nothing of
// them: a pass over the outputs adds them afterwards, and `dsinks` needs only what the forward pass left.
#include <cub/block/block_reduce.cuh>

#include "attention/params.h"
#include "attention/softmax.cuh"
#include "common/document_tiles.cuh"
#include "common/launch.h"
#include "common/mma.cuh"

namespace lemo::cuda::attention {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 8;  // per (row, head)
constexpr int kItems = kThreads / kLanes;

template <typename T>
__global__ void __launch_bounds__(kThreads) add_sinks_kernel(const __grid_constant__ Sinks params) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kItems + threadIdx.x / kLanes;
  const int64_t row = item / params.heads;
  const int head = static_cast<int>(item % params.heads), lane = static_cast<int>(threadIdx.x % kLanes);
  const bool exists = row < params.documents.cu_seqlens[params.documents.count];
  const float sink = params.sinks[head];
  float* lse = params.lse + head * params.lse_stride + row;
  const float before = exists ? *lse : 0.0f;
  __syncwarp();  // every lane of the row has read it
  if (!exists || sink == -INFINITY) return;
  const auto [after, factor] = WithSink(before, sink);
  T* out =
      head_pointer<T>(params.out, head) + storage_row(params.documents, static_cast<int>(row)) * params.out.row_stride;
  for (int column = lane * 8; column < params.head_dim; column += kLanes * 8) {
    uint4& words = *reinterpret_cast<uint4*>(out + column);
    float x[8];
    unpack<T>(words, x);
    words = make_uint4(pack<T>(x[0] * factor, x[1] * factor), pack<T>(x[2] * factor, x[3] * factor),
                       pack<T>(x[4] * factor, x[5] * factor), pack<T>(x[6] * factor, x[7] * factor));
  }
  if (lane == 0) *lse = after;
}

// A block per head, so that the sum has a fixed order.
template <typename T>
__global__ void __launch_bounds__(kThreads) sink_gradient_kernel(const __grid_constant__ SinkGradient params) {
  using Reduce = cub::BlockReduce<float, kThreads, cub::BLOCK_REDUCE_WARP_REDUCTIONS>;
  __shared__ typename Reduce::TempStorage storage;
  const int head = static_cast<int>(blockIdx.x), lane = static_cast<int>(threadIdx.x % kLanes);
  const int rows = params.documents.cu_seqlens[params.documents.count];
  const float sink = params.sinks[head];
  float sum = 0.0f;
  for (int row = static_cast<int>(threadIdx.x / kLanes); row < rows && sink != -INFINITY; row += kItems) {
    const int64_t from = storage_row(params.documents, row);
    const T* dout = head_pointer<T>(params.dout, head) + from * params.dout.row_stride;
    const T* out = head_pointer<T>(params.out, head) + from * params.out.row_stride;
    float delta = 0.0f;
    for (int column = lane * 8; column < params.head_dim; column += kLanes * 8) {
      float a[8], b[8];
      unpack<T>(*reinterpret_cast<const uint4*>(dout + column), a);
      unpack<T>(*reinterpret_cast<const uint4*>(out + column), b);
#pragma unroll
      for (int i = 0; i < 8; ++i) delta = fmaf(a[i], b[i], delta);
    }
    sum = fmaf(-expf(sink - params.lse[head * params.lse_stride + row]), delta, sum);
  }
  sum = Reduce(storage).Sum(sum);
  if (threadIdx.x == 0) params.dsinks[head] = sum;
}

}  // namespace

void launch_add_sinks(const Sinks& params, int32_t dtype, cudaStream_t stream) {
  const int64_t items = params.documents.capacity * params.heads;
  if (items <= 0) return;
  with_type(dtype, "attention_forward", [&](auto type) {
    launch("attention_forward", add_sinks_kernel<decltype(type)>, static_cast<unsigned>((items + kItems - 1) / kItems),
           kThreads, 0, stream, params);
  });
}

void launch_sink_gradient(const SinkGradient& params, int32_t dtype, cudaStream_t stream) {
  with_type(dtype, "attention_backward", [&](auto type) {
    launch("attention_backward", sink_gradient_kernel<decltype(type)>, static_cast<unsigned>(params.heads), kThreads, 0,
           stream, params);
  });
}

}  // namespace lemo::cuda::attention
