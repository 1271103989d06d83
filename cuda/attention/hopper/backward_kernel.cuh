// The backward kernel: one thread block per key tile and key head, one producer warp and two consumer warpgroups.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "backward_mainloop.cuh"

namespace lemo::cuda::attention::hopper {

// A consumer warp's 16 rows of a gradient: through its own shared memory, so that rows leave in stores of 16 bytes.
template <typename T, int kHeadDim, class Gradient>
__device__ __forceinline__ void store_gradient(uint16_t* staged, const BackwardKernelParams& params, const Tile& tile,
                                               const Rows& target, int head, int row_start, const Gradient& gradient,
                                               float factor) {
  constexpr int kPitch = kHeadDim + kPadding;
  const int lane = thread_index() % 32;
  __syncwarp();  // what was staged before has been read
#pragma unroll
  for (int j = 0; j < decltype(cute::size(gradient))::value; j += 2) {
    *reinterpret_cast<uint32_t*>(staged + (lane / 4 + j / 2 % 2 * 8) * kPitch + j / 4 * 8 + lane % 4 * 2) =
        pack<T>(gradient(j) * factor, gradient(j + 1) * factor);
  }
  __syncwarp();
  const int chunks = kHeadDim == 96 ? params.head_dim / 8 : kHeadDim / 8;
  for (int item = lane; item < 16 * chunks; item += 32) {
    const int row = item / chunks, chunk = item % chunks;
    if (row_start + row >= tile.length) continue;
    T* to =
        head_pointer<T>(target, head) + storage_row(params.documents, tile.start + row_start + row) * target.row_stride;
    *reinterpret_cast<uint4*>(to + chunk * 8) = *reinterpret_cast<const uint4*>(staged + row * kPitch + chunk * 8);
  }
}

template <typename T, int kHeadDim, bool kWeighted, bool kListed>
__global__ void __launch_bounds__((kBackwardConsumers + 1) * 128, 1)
    backward_kernel_hopper(const __grid_constant__ BackwardKernelParams params) {
  using Mainloop = BackwardMainloop<T, kHeadDim, kWeighted, kListed>;
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& shared = *reinterpret_cast<typename Mainloop::Shared*>(raw);
  const KeyWork work = locate_keys<Mainloop::kQueries>(params, static_cast<int>(blockIdx.x));
  if (work.tile.index >= work.tile.count) return;
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  if (threadIdx.x == 0) {
    Mainloop::init(shared);
    Mainloop::choose_start(params, shared, work);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<kBackwardProducerRegisters>();
    const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
    if (warp == 0) Mainloop::load(params, shared, work);
  } else {
    cutlass::arch::warpgroup_reg_alloc<kBackwardConsumerRegisters>();
    typename Mainloop::KeyMma key_mma;
    auto dk = cute::partition_fragment_C(key_mma, cute::Shape<cute::Int<kBackwardKeys>, cute::Int<kHeadDim>>{});
    auto dv = cute::partition_fragment_C(key_mma, cute::Shape<cute::Int<kBackwardKeys>, cute::Int<kHeadDim>>{});
    Mainloop::compute(params, shared, work, warpgroup - 1, dk, dv);

    // The queries' stages are free once both warpgroups are done.
    cutlass::arch::NamedBarrier::sync(kBackwardConsumers * 128, 1);
    const int warp = thread_index() / 32 - 4;
    constexpr int kStagedElements = 16 * (kHeadDim + kPadding);
    static_assert(kBackwardWarps * kStagedElements <= Mainloop::kQueryStages * Mainloop::kTile);
    uint16_t* staged = reinterpret_cast<uint16_t*>(shared.q) + warp * kStagedElements;
    const int row_start = work.key_start + warp * 16;
    store_gradient<T, kHeadDim>(staged, params, work.tile, params.dv, work.key_head, row_start, dv, 1.0f);
    store_gradient<T, kHeadDim>(staged, params, work.tile, params.dk, work.key_head, row_start, dk, params.scale);
  }
}

}  // namespace lemo::cuda::attention::hopper
