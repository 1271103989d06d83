// Deterministic mode: key tiles add to a query tile's dQ in ascending order, each when its turn has come.
//
// A turn counts the key tiles that have added to a (query tile, head). Thread blocks start in the order of their key
// tiles, so that whoever is waited for already runs. Waiting takes a thread of its own, which takes the staged dQ over
// from the consumers: they go on to the next step meanwhile.
#pragma once

#include "backward_sums.cuh"
#include "backward_walk.cuh"

namespace lemo::cuda::attention::hopper {

__device__ __forceinline__ void wait_turn(const int* turn, int mine) {
  int current;
  do {
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];\n" : "=r"(current) : "l"(turn) : "memory");
  } while (current != mine);
}
__device__ __forceinline__ void pass_turn(int* turn, int mine) {
  asm volatile("st.release.gpu.global.b32 [%0], %1;\n" ::"l"(turn), "r"(mine + 1) : "memory");
}
// Between plain and bulk accesses to device memory, which a turn alone does not order.
__device__ __forceinline__ void fence_bulk_global() { asm volatile("fence.proxy.async.global;\n" ::: "memory"); }

// The adding thread: each step's dQ in its turn. A lone thread, since lanes that sleep at a barrier would keep the one
// that waits for its turn from looking.
template <int kHeadDim, class Walk>
__device__ __forceinline__ void add_in_order(const BackwardKernelParams& params, const KeyWork& work, Walk walk,
                                             const float* staged, SumHandover& handover) {
  constexpr int kSize = DqOrder<kHeadDim>::kSize;
  uint32_t phase = 0;
#pragma unroll 1
  while (walk.steps > 0) {
    const int item = item_of(params, work, walk);
    const int rank = walk.rank(params, work);
    wait_turn(params.turns + item, rank);
    fence_bulk_global();
    handover.staged.wait(phase);
    bulk_add(params.dq_sums + static_cast<int64_t>(item) * kSize, staged, kSize * 4);
    bulk_wait_read();
    handover.taken.arrive();
    bulk_wait();
    fence_bulk_global();
    pass_turn(params.turns + item, rank);
    phase ^= 1;
    walk.advance();
  }
}

}  // namespace lemo::cuda::attention::hopper
