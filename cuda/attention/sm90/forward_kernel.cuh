// The persistent forward kernel: one producer warpgroup (of which three warps work) and the consumer warpgroups.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "attention/sm90/forward_mainloop.cuh"
#include "attention/sm90/staged_rows.cuh"

namespace lemo::cuda::attention::sm90 {

template <class Mainloop, int kHeadDim>
struct ForwardShared {
  typename Mainloop::Shared mainloop;
  StagedRows<kHeadDim> staged[Mainloop::kConsumers * 4];
};

// kSinks: there may be sinks. kSoftCap: there is a soft-cap.
template <typename T, int kHeadDim, Visits kVisits, bool kSinks, bool kSoftCap>
__global__ void __launch_bounds__((kForwardShape<kHeadDim, kVisits>.queries / 64 + 1) * 128, 1)
    forward_kernel_sm90(const __grid_constant__ ForwardKernelParams params) {
  using Mainloop = ForwardMainloop<T, kHeadDim, kVisits, kSoftCap>;
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& shared = *reinterpret_cast<ForwardShared<Mainloop, kHeadDim>*>(raw);
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);

  if (threadIdx.x == 0) {
    Mainloop::init(shared.mainloop);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Mainloop::kShape.producer_registers>();
    if (warp == 0) Mainloop::load_keys(params, shared.mainloop);
    if (warp == 1) Mainloop::load_values(params, shared.mainloop);
    if (warp == 2) Mainloop::hand_out(params, shared.mainloop);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Mainloop::kShape.consumer_registers>();
    const auto store = [&](const Work& work, const Part& part, const auto& softmax, const auto& out) {
      float inverse[2];
      const int lane = thread_index() % 32;
      const int warp_start = part.row + warp % 4 * 16;
      const float sink = kSinks && params.sinks != nullptr ? params.sinks[part.head] : -INFINITY;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float lse;
        softmax.finish(r, params.scale_log2, inverse[r], lse);
        if (kSinks && sink > -INFINITY) {
          const WithSink with(lse, sink);
          lse = with.lse;
          inverse[r] *= with.factor;
        }
        const int row = warp_start + lane / 4 + r * 8;
        if (lane % 4 == 0 && row < work.tile.length && row >= work.tile.first) {
          params.lse[part.head * params.lse_stride + work.tile.start + row] = lse;
        }
      }
      shared.staged[warp - 4].template store<T>(params.documents, work.tile, params.out, part.head, params.head_dim,
                                                warp_start, out, inverse);
    };
    Mainloop::compute(params, shared.mainloop, warpgroup - 1, store);
  }
}

}  // namespace lemo::cuda::attention::sm90
