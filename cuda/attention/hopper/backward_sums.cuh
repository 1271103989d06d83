// dQ on its way from the accumulators of a warp to the fp32 sums in device memory.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/tensor.hpp>

#include "backward_params.h"
#include "cuda/common/mma.cuh"

namespace lemo::cuda::attention::hopper {

// Adds `bytes` of shared memory to device memory, asynchronously, as one bulk group of this thread.
__device__ __forceinline__ void bulk_add(float* target, const float* source, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\n" ::"l"(target),
               "r"(shared_address(source)), "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}
__device__ __forceinline__ void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;\n" ::: "memory"); }
__device__ __forceinline__ void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;\n" ::: "memory"); }

__device__ __forceinline__ void wait_turn(const int* turn, int mine) {
  int current;
  do {
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];\n" : "=r"(current) : "l"(turn) : "memory");
  } while (current != mine);
}
__device__ __forceinline__ void pass_turn(int* turn, int mine) {
  asm volatile("st.release.gpu.global.b32 [%0], %1;\n" ::"l"(turn), "r"(mine + 1) : "memory");
}

// One warp's part. Every warp has its own buffer, its own bulk groups and its own turns: no barrier between warps.
//
// In order (turns != null), key tile j adds to a query tile after key tile j - 1. Thread blocks start in the order of
// their key tiles, so that whoever is waited for already runs.
template <int kHeadDim>
class SumWriter {
 public:
  static constexpr int kBufferFloats = 16 * 64;

  __device__ __forceinline__ SumWriter(float* buffer, int key_tile) : buffer_(buffer), key_tile_(key_tile) {}

  // Copies the accumulators to shared memory, once what was sent before has left it.
  template <class Out>
  __device__ __forceinline__ void stage(const BackwardKernelParams& params, int64_t item, const Out& dq) {
    using Order = DqOrder<kHeadDim>;
    const int lane = thread_index() % 32, warp = thread_index() / 32 % 4, warpgroup = thread_index() / 128 - 1;
    if (lane == 0) {
      if (params.turns != nullptr) {
        finish(params);
        wait_turn(params.turns + item * kBackwardWarps + warpgroup * 4 + warp, key_tile_);
        cutlass::arch::fence_view_async_shared();
      } else {
        bulk_wait_read();
      }
    }
    __syncwarp();
    item_ = item;
    const int chunks = Order::chunks(warpgroup);
#pragma unroll
    for (int i = 0; i < Order::chunks(0); ++i) {
      if (Order::chunks(0) == Order::chunks(1) || i < chunks) {
        *reinterpret_cast<float4*>(buffer_ + (i * 32 + lane) * 4) =
            make_float4(dq(4 * i), dq(4 * i + 1), dq(4 * i + 2), dq(4 * i + 3));
      }
    }
  }

  // Adds what was staged. A step later than staging: the fence waits for the stores, and by then they have long
  // arrived.
  __device__ __forceinline__ void send(const BackwardKernelParams& params) {
    using Order = DqOrder<kHeadDim>;
    const int warp = thread_index() / 32 % 4, warpgroup = thread_index() / 128 - 1;
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    if (thread_index() % 32 == 0) {
      bulk_add(params.dq_sums + item_ * Order::kSize + Order::offset(warpgroup, warp), buffer_,
               Order::chunks(warpgroup) * Order::kChunkFloats * 4);
    }
  }

  // After the last addition; by every lane.
  __device__ __forceinline__ void end(const BackwardKernelParams& params) {
    if (thread_index() % 32 != 0) return;
    if (params.turns != nullptr) {
      finish(params);
    } else {
      bulk_wait_read();
    }
  }

 private:
  // The turn passes on one step late, when the sums have long arrived.
  __device__ __forceinline__ void finish(const BackwardKernelParams& params) {
    bulk_wait();
    if (item_ < 0) return;
    const int warp = thread_index() / 32 - 4;
    asm volatile("fence.proxy.async.global;\n" ::: "memory");
    __threadfence();
    pass_turn(params.turns + item_ * kBackwardWarps + warp, key_tile_);
  }

  float* buffer_;
  int key_tile_;
  int64_t item_ = -1;  // staged last
};

}  // namespace lemo::cuda::attention::hopper
