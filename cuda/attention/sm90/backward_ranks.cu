// Deterministic mode with tile lists: the turns in which key tiles add to a query tile.
#include "attention/sm90/backward_walk.cuh"
#include "common/launch.h"

namespace lemo::cuda::attention::sm90 {
namespace {

constexpr int kThreads = 128;

// One warp per query tile, which searches the list of every earlier key tile for it.
__global__ void __launch_bounds__(kThreads) backward_ranks_kernel(const __grid_constant__ BackwardKernelParams params) {
  const int slot = static_cast<int>(blockIdx.x * (kThreads / 32) + threadIdx.x / 32);
  if (slot >= params.key_slots) return;
  const Tile tile = locate_tile(params.documents, kBackwardKeys, slot);
  if (tile.index >= tile.count) return;
  const int32_t* offsets = params.lists.offsets + slot - tile.index;  // of the document
  const int32_t* query_tiles = params.lists.tiles;
  const int lane = static_cast<int>(threadIdx.x % 32);
  int rank = 0;
  for (int base = 0; base < tile.index; base += 32) {
    const int key_tile = base + lane;
    bool listed = false;
    int begin = 0;
    if (key_tile < tile.index) {
      begin = offsets[key_tile];
      const int list_end = offsets[key_tile + 1];
      for (int end = list_end; begin < end;) {
        const int middle = (begin + end) / 2;
        if (query_tiles[middle] < tile.index) {
          begin = middle + 1;
        } else {
          end = middle;
        }
      }
      listed = begin < list_end && query_tiles[begin] == tile.index;
    }
    const unsigned all = __ballot_sync(0xffffffffu, listed);
    if (listed) params.ranks[begin] = rank + __popc(all & ((1u << lane) - 1));
    rank += __popc(all);
  }
  if (lane == 0) params.ranks[params.list_capacity + slot] = rank;
}

}  // namespace

void launch_backward_ranks(const BackwardKernelParams& params, cudaStream_t stream) {
  constexpr int kWarps = kThreads / 32;
  launch("attention_backward", backward_ranks_kernel, static_cast<unsigned>((params.key_slots + kWarps - 1) / kWarps),
         kThreads, 0, stream, params);
}

}  // namespace lemo::cuda::attention::sm90
