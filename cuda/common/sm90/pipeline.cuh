// Ring of shared-memory stages between one producer warp and the consumer warpgroups.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/arch/cluster_sm90.hpp>
#include <cutlass/pipeline/sm90_pipeline.hpp>

#include "common/mma.cuh"

namespace lemo::cuda::sm90 {

using FullBarrier = cutlass::arch::ClusterTransactionBarrier;
using EmptyBarrier = cutlass::arch::ClusterBarrier;

// A consumer warp signals with one arrival that all its lanes are done. The race checker takes that arrival to order
// only the arriving lane's accesses, and reports those of the other lanes; in a build for it, every lane arrives.
#ifdef LEMO_CUDA_RACECHECK
constexpr int kArrivals = 32;
#else
constexpr int kArrivals = 1;
#endif
__device__ __forceinline__ void init_for_warps(EmptyBarrier& barrier, int warps, int threads = 0) {
  barrier.init(warps * kArrivals + threads);
}
// Called by the whole warp, which has synchronized since its last access.
__device__ __forceinline__ void arrive_as_warp(EmptyBarrier& barrier) {
  if (kArrivals == 32 || thread_index() % 32 == 0) barrier.arrive();
}

// `full` completes when a stage's bytes have arrived, `empty` when every consumer warp has released it.
template <int kStages>
struct Ring {
  using State = cutlass::PipelineState<kStages>;

  FullBarrier full[kStages];
  EmptyBarrier empty[kStages];

  // The producer starts one phase ahead: its first wait for an empty stage succeeds at once.
  static __device__ __forceinline__ State producer_start() { return {0, 1, 0}; }

  // `threads`: consumers that are single threads (release_as_thread), in addition to the warps.
  __device__ __forceinline__ void init(int consumer_warps, int threads = 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      full[stage].init(1);
      init_for_warps(empty[stage], consumer_warps, threads);
    }
  }

  // Called by the whole producer warp; returns the barrier at which the copies report. wait_empty and expect are its
  // two halves, for a producer that also writes to the stage itself: `also` runs in the lane that arrives, before it
  // does.
  __device__ __forceinline__ uint64_t* acquire(const State& state, uint32_t bytes) {
    wait_empty(state);
    return expect(state, bytes, [] {});
  }
  __device__ __forceinline__ void wait_empty(const State& state) { empty[state.index()].wait(state.phase()); }
  template <class Also>
  __device__ __forceinline__ uint64_t* expect(const State& state, uint32_t bytes, const Also& also) {
    if (cute::elect_one_sync()) {
      also();
      full[state.index()].arrive_and_expect_tx(bytes);
    }
    return reinterpret_cast<uint64_t*>(&full[state.index()]);
  }

  __device__ __forceinline__ void wait(const State& state) { full[state.index()].wait(state.phase()); }

  // Called by the whole consumer warp, after its last read of the stage.
  __device__ __forceinline__ void release(const State& state) { arrive_as_warp(empty[state.index()]); }
  __device__ __forceinline__ void release_as_thread(const State& state) { empty[state.index()].arrive(); }
};

// The ids of all named barriers (CUTLASS adds an offset for those it reserves). Kernels use different lines, so ids
// repeat.
enum NamedBarrierId : uint32_t {
  kFirstTurn = 1,              // forward and scores: Turns, one barrier per consumer warpgroup
  kScoresConsumersMeet = 3,    // scores, after its two turns: both consumer warpgroups
  kBackwardConsumersMeet = 1,  // backward, which takes no turns: both consumer warpgroups
};

// Consumer warpgroups issue their products in turn, so that one does its arithmetic while the other's products run.
template <int kConsumers>
struct Turns {
  static constexpr uint32_t kThreads = 256;  // the warpgroup that passes its turn on, and the one that takes it

  static __device__ __forceinline__ void take(int consumer) {
    cutlass::arch::NamedBarrier::sync(kThreads, static_cast<uint32_t>(kFirstTurn + consumer));
  }
  static __device__ __forceinline__ void pass(int consumer) {
    cutlass::arch::NamedBarrier::arrive(kThreads, static_cast<uint32_t>(kFirstTurn + (consumer + 1) % kConsumers));
  }
  // Once per kernel, before the first tile.
  static __device__ __forceinline__ void start(int consumer) {
    if (consumer == kConsumers - 1) pass(consumer);
  }
};

}  // namespace lemo::cuda::sm90
