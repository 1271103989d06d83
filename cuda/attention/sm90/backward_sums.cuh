// How dQ leaves a warp's accumulators for the fp32 sums in device memory.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/tensor.hpp>

#include "attention/sm90/backward_params.h"
#include "common/mma.cuh"
#include "common/sm90/pipeline.cuh"

namespace lemo::cuda::attention::sm90 {

// Adds `bytes` of shared memory to device memory, asynchronously, as one bulk group of this thread.
__device__ __forceinline__ void bulk_add(float* target, const float* source, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\n" ::"l"(target),
               "r"(shared_address(source)), "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}
__device__ __forceinline__ void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;\n" ::: "memory"); }
__device__ __forceinline__ void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;\n" ::: "memory"); }

constexpr int kAdders = 2;  // with a third, `odd` below would have to be a count

// A step's dQ passes from the consumer warps to the thread that adds it (backward_adder.cuh).
struct SumHandover {
  EmptyBarrier staged[kAdders], taken;

  __device__ __forceinline__ void init() {
    for (EmptyBarrier& barrier : staged) init_for_warps(barrier, kBackwardWarps);
    taken.init(1);
  }
};

// One consumer warp's part of dQ: every warp stages its own, with no barrier between warps.
template <int kHeadDim>
class SumWriter {
 public:
  // `buffer` holds one step's dQ of all warps in DqOrder.
  __device__ __forceinline__ SumWriter(float* buffer, SumHandover& handover)
      : handover_(handover), buffer_(buffer + part()) {}

  // Copies the accumulators to shared memory, once the previous step's have left it. `odd`: 1 in every other step.
  template <class Out>
  __device__ __forceinline__ void stage(uint32_t odd, const Out& dq) {
    using Order = DqOrder<kHeadDim>;
    const int lane = thread_index() % 32, warpgroup = thread_index() / 128 - 1;
    handover_.taken.wait(odd ^ 1);  // returns at once in the first step
    __syncwarp();
    const int chunks = Order::chunks(warpgroup);
#pragma unroll
    for (int i = 0; i < Order::chunks(0); ++i) {
      if (Order::chunks(0) == Order::chunks(1) || i < chunks) {
        *reinterpret_cast<float4*>(buffer_ + (i * 32 + lane) * 4) =
            make_float4(dq(4 * i), dq(4 * i + 1), dq(4 * i + 2), dq(4 * i + 3));
      }
    }
  }

  // Hands over what was staged with the same `odd`. Called a step later: the fence waits for the stores, which have
  // long arrived by then.
  __device__ __forceinline__ void send(uint32_t odd) {
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    arrive_as_warp(handover_.staged[odd]);
  }

 private:
  static __device__ __forceinline__ int part() {
    return DqOrder<kHeadDim>::offset(thread_index() / 128 - 1, thread_index() / 32 % 4);
  }

  SumHandover& handover_;
  float* buffer_;
};

}  // namespace lemo::cuda::attention::sm90
