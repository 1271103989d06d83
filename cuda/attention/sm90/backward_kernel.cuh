// The backward kernel: one thread block per key tile and key head, one producer warp, two threads that add dQ, and two
// consumer warpgroups.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "attention/sm90/backward_load.cuh"
#include "attention/sm90/backward_mainloop.cuh"
#include "attention/sm90/backward_parts.cuh"
#include "attention/sm90/staged_rows.cuh"

namespace lemo::cuda::attention::sm90 {

template <typename T, int kHeadDim, bool kWeighted, Visits kVisits, bool kSoftCap>
__global__ void __launch_bounds__((kBackwardConsumers + 1) * 128, 1)
    backward_kernel_sm90(const __grid_constant__ BackwardKernelParams params) {
  using Mainloop = BackwardMainloop<T, kHeadDim, kWeighted, kVisits, kSoftCap>;
  constexpr bool kListed = Mainloop::kListed;
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& shared = *reinterpret_cast<typename Mainloop::Shared*>(raw);
  const KeyWork work = [&] {
    const int block = static_cast<int>(blockIdx.x);
    if constexpr (kListed) return locate_unit<Mainloop::kQueries>(params, block);
    return locate_keys<Mainloop::kQueries>(params, block);
  }();
  if (work.tile.index >= work.tile.count) return;
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  if (threadIdx.x < 32) {
    if (threadIdx.x == 0) {
      Mainloop::init(shared);
      cutlass::arch::fence_barrier_init();
    }
    __syncwarp();
    Mainloop::choose_start(params, shared, work);
  }
  __syncthreads();

  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<kBackwardProducerRegisters>();
    const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
    if (warp == 0) load_steps<Mainloop>(params, shared, work);
    if (warp >= 1 && warp <= kAdders && threadIdx.x % 32 == 0) Mainloop::add(params, shared, work, warp - 1);
  } else {
    cutlass::arch::warpgroup_reg_alloc<kBackwardConsumerRegisters>();
    typename Mainloop::KeyMma key_mma;
    auto dk = cute::partition_fragment_C(key_mma, cute::Shape<cute::Int<kBackwardKeys>, cute::Int<kHeadDim>>{});
    auto dv = cute::partition_fragment_C(key_mma, cute::Shape<cute::Int<kBackwardKeys>, cute::Int<kHeadDim>>{});
    Mainloop::compute(params, shared, work, warpgroup - 1, dk, dv);
    if constexpr (kListed) {
      if (!add_parts<kHeadDim>(params, params.units[work.unit_index], work.key_head, &shared.start, dk, dv)) return;
    }

    // The queries' stages are free once both warpgroups are done.
    cutlass::arch::NamedBarrier::sync(kBackwardConsumers * 128, kBackwardConsumersMeet);
    const int warp = thread_index() / 32 - 4;
    using Staged = StagedRows<kHeadDim>;
    static_assert(kBackwardWarps * sizeof(Staged) <= sizeof(shared.q));
    Staged& staged = reinterpret_cast<Staged*>(shared.q)[warp];
    const int row_start = work.key_start + warp * 16;
    const auto store = [&](const TensorView& target, const auto& gradient, float factor) {
      staged.template store<T>(params.key_documents, work.tile, target, work.key_head, params.head_dim, row_start,
                               gradient, {factor, factor});
    };
    store(params.dv, dv, 1.0f);
    store(params.dk, dk, params.scale);
  }
}

}  // namespace lemo::cuda::attention::sm90
