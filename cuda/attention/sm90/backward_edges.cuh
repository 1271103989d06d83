// Windows, seen from the keys: the queries before which a key tile's keys are near enough.
#pragma once

#include "attention/sm90/backward_walk.cuh"
#include "common/mma.cuh"

namespace lemo::cuda::attention::sm90 {

// Of a thread block's keys, 16 per consumer warp; in shared memory, because accumulators leave no registers.
struct KeyEdges {
  int edge[kBackwardKeys];

  // Called by every lane of a consumer warp.
  __device__ __forceinline__ void load(const BackwardKernelParams& params, const KeyWork& work) {
    const int lane = thread_index() % 32, key = (thread_index() / 32 - 4) * 16 + lane;
    if (lane < 16) edge[key] = params.edges[work.tile.start + min(work.key_start + key, work.tile.length - 1)];
    __syncwarp();
  }

  // Clears the probabilities, [keys, queries], that the window hides in the query tile that begins at query_start: of
  // this lane's elements kBegin to kEnd.
  template <int kBegin, int kEnd, class Scores>
  __device__ __forceinline__ void hide(int query_start, Scores& p) const {
    const int warp = thread_index() / 32 - 4, lane = thread_index() % 32;
    if (query_start + kEnd * 2 <= edge[warp * 16]) return;  // edges ascend
    const int key = warp * 16 + lane / 4, column = query_start + lane % 4 * 2;
    const int seen[2] = {edge[key] - column, edge[key + 8] - column};
#pragma unroll
    for (int j = kBegin; j < kEnd; ++j) {
      if (j / 4 * 8 + j % 2 >= seen[j / 2 % 2]) p(j) = 0.0f;
    }
  }
};

struct NoEdges {
  __device__ __forceinline__ void load(const BackwardKernelParams&, const KeyWork&) {}
};

}  // namespace lemo::cuda::attention::sm90
