// Key weights of mode `backward`: w_ij = weight of j's block slot, or 1 if query i lies in the same slot.
#pragma once

#include "attention/sm90/backward_walk.cuh"
#include "common/mma.cuh"

namespace lemo::cuda::attention::sm90 {

// The weights and slots of a thread block's keys, 16 per consumer warp; in shared memory, because accumulators leave no
// registers.
struct KeyWeights {
  float weight[kBackwardKeys];
  int slot[kBackwardKeys];
  int near_end[kBackwardWarps];  // queries from here on share no slot with these keys: rows of a slot are neighbors

  // Called by every lane of a consumer warp.
  __device__ __forceinline__ void load(const BackwardKernelParams& params, const KeyWork& work) {
    const Tile& tile = work.tile;
    const int32_t* slots = params.key_row_slots + tile.start;
    const int warp = thread_index() / 32 - 4, lane = thread_index() % 32;
    if (lane < 16) {
      const int key = warp * 16 + lane;
      const bool valid = work.key_start + key < tile.length;
      slot[key] = valid ? slots[work.key_start + key] : -1;
      weight[key] = valid ? params.key_weights[slot[key]] : 1.0f;
    }
    // Where queries are other rows, nothing is known of where a slot's lie: every one is compared.
    int end = params.documents.aligned ? tile.length : work.key_start + kBackwardKeys;
    while (end < tile.length) {
      const int row = end + lane;
      const bool same = row < tile.length && slots[row] == slots[work.key_start + kBackwardKeys - 1];
      const unsigned differ = ~__ballot_sync(0xffffffffu, same);
      end += differ == 0 ? 32 : __ffs(static_cast<int>(differ)) - 1;
      if (differ != 0) break;
    }
    if (lane == 0) near_end[warp] = end;
    __syncwarp();
  }

  // Weighs the probabilities, [keys, queries], of the query tile that begins at query_start: this lane's elements
  // kBegin to kEnd.
  template <int kBegin, int kEnd, class Scores>
  __device__ __forceinline__ void apply(const BackwardKernelParams& params, const KeyWork& work, int query_start,
                                        Scores& p) const {
    const int warp = thread_index() / 32 - 4, key = warp * 16 + thread_index() % 32 / 4;
    const float weights[2] = {weight[key], weight[key + 8]};
    if (query_start >= near_end[warp]) {
#pragma unroll
      for (int j = kBegin; j < kEnd; ++j) p(j) *= weights[j / 2 % 2];
      return;
    }
    const int32_t* query_slots = params.row_slots + work.query_row;
#pragma unroll
    for (int j = kBegin; j < kEnd; j += 4) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int row = query_start + j * 2 + thread_index() % 4 * 2 + c;
        const int query_slot = row < work.tile.length && row >= work.first_query ? query_slots[row] : -1;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (query_slot != slot[key + half * 8]) p(j + 2 * half + c) *= weights[half];
        }
      }
    }
  }
};

struct NoWeights {
  __device__ __forceinline__ void load(const BackwardKernelParams&, const KeyWork&) {}
};

}  // namespace lemo::cuda::attention::sm90
