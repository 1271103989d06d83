// The threads that add every step's dQ to the sums in device memory.
//
// They take the staged dQ over from the consumers, which meanwhile proceed to the next step: consumers neither issue
// nor wait for the addition. Each is alone in its warp, since in deterministic mode lanes asleep at a barrier would
// keep the lane that waits for its turn from polling. They alternate, so that one step's addition may still be in
// flight when the next one's begins.
//
// Deterministic mode: key tiles add to a query tile's dQ in a fixed order, each in its turn. A turn counts the key
// tiles that have added to a (query tile, head). The order is ascending; thread blocks start in it, so a block only
// waits for blocks already running. With tile lists it is the plan's (backward_plan.cu).
#pragma once

#include "attention/sm90/backward_sums.cuh"
#include "attention/sm90/backward_walk.cuh"

namespace lemo::cuda::attention::sm90 {

__device__ __forceinline__ void wait_turn(const int* turn, int mine) {
  int current;
  do {
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];\n" : "=r"(current) : "l"(turn) : "memory");
  } while (current != mine);
}
__device__ __forceinline__ void pass_turn(int* turn, int mine) {
  asm volatile("st.release.gpu.global.b32 [%0], %1;\n" ::"l"(turn), "r"(mine + 1) : "memory");
}
// Orders plain and bulk accesses to device memory, which a turn alone does not.
__device__ __forceinline__ void fence_bulk_global() { asm volatile("fence.proxy.async.global;\n" ::: "memory"); }

// Adding thread `adder`: every kAdders-th of `total` steps, each from its stage; Walk gives a key tile's turn. Skipping
// the other thread's steps is safe: later steps are loaded later.
template <int kHeadDim, class Walk, int kStages>
__device__ __forceinline__ void add_sums(const BackwardKernelParams& params, const KeyWork& work, int adder, int total,
                                         Ring<kStages>& stages, const BackwardStep* steps, const float* staged,
                                         SumHandover& handover) {
  constexpr int kSize = DqOrder<kHeadDim>::kSize;
  const bool ordered = params.turns != nullptr;
  cutlass::PipelineState<kStages> stage;
  if (adder > 0) ++stage;
  uint32_t phase = 0;
#pragma unroll 1
  for (int left = total - adder; left > 0; left -= kAdders) {
    stages.wait(stage);
    const BackwardStep step = steps[stage.index()];
    stages.release_as_thread(stage);
    for (int skipped = 0; skipped < kAdders; ++skipped) ++stage;
    const int rank = ordered ? Walk::rank(params, work, step) : 0;
    if (ordered) {
      wait_turn(params.turns + step.item, rank);
      fence_bulk_global();
    }
    handover.staged[adder].wait(phase);
    bulk_add(params.dq_sums + static_cast<int64_t>(step.item) * kSize, staged, kSize * 4);
    bulk_wait_read();
    handover.taken.arrive();
    if (ordered) {
      bulk_wait();
      fence_bulk_global();
      pass_turn(params.turns + step.item, rank);
    }
    phase ^= 1;
  }
}

}  // namespace lemo::cuda::attention::sm90
