// The persistent forward kernel: one producer warpgroup (of which one warp works) and the consumer warpgroups.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "forward_mainloop.cuh"
#include "staged_rows.cuh"

namespace lemo::cuda::attention::hopper {

// Work items on their way from the producer to the consumers.
struct ItemQueue {
  EmptyBarrier full, empty;
  int item;
};

template <class Mainloop, int kHeadDim>
struct ForwardShared {
  typename Mainloop::Shared mainloop;
  StagedRows<kHeadDim> staged[Mainloop::kConsumers * 4];
  ItemQueue queue;
};

// What a work item stands for; `valid` is false in the slots that rounding leaves empty.
struct WorkItem {
  Tile tile;
  int slot, head, query_tile;
  bool valid;
};
template <int kQueries>
__device__ __forceinline__ WorkItem decode(const ForwardKernelParams& params, int item) {
  const ForwardSchedule& schedule = params.schedule;
  const int section = item / (schedule.slots * schedule.section);
  const int first_head = section * schedule.section;
  const int heads = min(schedule.section, params.heads - first_head);
  const int rest = item - section * schedule.slots * schedule.section;
  const int slot = rest / heads;
  WorkItem work;
  work.tile = locate_tile(params.documents, kQueries, slot);
  work.head = first_head + rest - slot * heads;
  work.valid = work.tile.index < work.tile.count;
  work.query_tile = work.tile.count - 1 - work.tile.index;
  work.slot = slot - work.tile.index + work.query_tile;
  return work;
}

template <typename T, int kHeadDim, bool kListed>
__global__ void __launch_bounds__((kForwardShape<kHeadDim, kListed>.queries / 64 + 1) * 128, 1)
    forward_kernel_hopper(const __grid_constant__ ForwardKernelParams params) {
  using Mainloop = ForwardMainloop<T, kHeadDim, kListed>;
  constexpr int kConsumers = Mainloop::kConsumers, kQueries = Mainloop::kQueries;
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& shared = *reinterpret_cast<ForwardShared<Mainloop, kHeadDim>*>(raw);
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);

  if (threadIdx.x == 0) {
    shared.mainloop.queries.init(kConsumers * 4);
    shared.mainloop.keys.init(kConsumers * 4);
    shared.mainloop.values.init(kConsumers * 4);
    shared.queue.full.init(1);
    init_for_warps(shared.queue.empty, kConsumers * 4);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Mainloop::kShape.producer_registers>();
    if (warp != 0) return;
    typename Mainloop::ProducerState state;
    uint32_t phase = 1;
    int item = static_cast<int>(blockIdx.x);
    while (item < params.schedule.items) {
      int next = 0;
      if (thread_index() % 32 == 0) next = static_cast<int>(gridDim.x) + atomicAdd(params.schedule.next, 1);
      const WorkItem work = decode<kQueries>(params, item);
      if (work.valid) {
        const typename Mainloop::Walk walk(params.lists, work.tile, work.slot, work.query_tile);
        Mainloop::load(params, shared.mainloop, state, work.tile, walk, work.query_tile, work.head);
      }
      item = __shfl_sync(0xffffffffu, next, 0);
      shared.queue.empty.wait(phase);
      if (thread_index() % 32 == 0) {
        shared.queue.item = item;
        shared.queue.full.arrive();
      }
      phase ^= 1;
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Mainloop::kShape.consumer_registers>();
    const int consumer = warpgroup - 1;
    typename Mainloop::ConsumerState state;
    uint32_t phase = 0;
    Turns<kConsumers>::start(consumer);
    int item = static_cast<int>(blockIdx.x);
    while (item < params.schedule.items) {
      const WorkItem work = decode<kQueries>(params, item);
      if (work.valid) {
        const typename Mainloop::Walk walk(params.lists, work.tile, work.slot, work.query_tile);
        RowSoftmax softmax;
        typename Mainloop::ValueMma value_mma;
        auto out = cute::partition_fragment_C(value_mma, cute::Shape<cute::Int<kQueries>, cute::Int<kHeadDim>>{});
        Mainloop::compute(params, shared.mainloop, state, walk, work.query_tile, consumer, softmax, out);

        float inverse[2];
        const int lane = thread_index() % 32;
        const int warp_start = work.query_tile * kQueries + consumer * 64 + thread_index() % 128 / 32 * 16;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float lse;
          softmax.finish(r, params.scale_log2, inverse[r], lse);
          const int row = warp_start + lane / 4 + r * 8;
          if (lane % 4 == 0 && row < work.tile.length) {
            params.lse[work.head * params.lse_stride + work.tile.start + row] = lse;
          }
        }
        store_staged<T, kHeadDim>(shared.staged[consumer * 4 + thread_index() % 128 / 32], params.documents, work.tile,
                                  params.out, work.head, params.head_dim, warp_start, out, inverse);
      }
      shared.queue.full.wait(phase);
      item = shared.queue.item;
      __syncwarp();
      arrive_as_warp(shared.queue.empty);
      phase ^= 1;
    }
  }
}

}  // namespace lemo::cuda::attention::hopper
