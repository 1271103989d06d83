// Deterministic mode with tile lists: the lists of the query tiles, which the backward pass is not given.
#include "attention/sm80/query_lists.h"
#include "common/document_tiles.cuh"
#include "common/launch.h"
#include "lemo/attention.h"

namespace lemo::cuda::attention::sm80 {
namespace {

constexpr int kThreads = 128;

// One warp per query tile, which searches the list of every earlier key tile for it, first to count what precedes its
// list in the document's, then to write it.
__global__ void __launch_bounds__(kThreads) query_lists_kernel(const __grid_constant__ QueryListsParams params) {
  const int slot = static_cast<int>(blockIdx.x * (kThreads / 32) + threadIdx.x / 32);
  if (slot > params.slots) return;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const Tile tile = locate_tile(params.documents, LEMO_TILE_ROWS, slot);
  if (tile.index >= tile.count) {  // what precedes it is whole documents, whose lists are as long either way round
    if (lane == 0) params.offsets[slot] = params.key_lists.offsets[slot];
    return;
  }
  const int32_t* offsets = params.key_lists.offsets + slot - tile.index;  // of the document
  const int32_t* query_tiles = params.key_lists.tiles;
  // The first entry of a key tile's list that is not below this tile.
  const auto search = [&](int key_tile) {
    int begin = offsets[key_tile];
    for (int end = offsets[key_tile + 1]; begin < end;) {
      const int middle = (begin + end) / 2;
      if (query_tiles[middle] < tile.index) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    return begin;
  };
  int before = 0;
  for (int key_tile = lane; key_tile < tile.index; key_tile += 32) before += search(key_tile) - offsets[key_tile];
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) before += __shfl_xor_sync(0xffffffffu, before, mask);
  int entry = offsets[0] + before;
  if (lane == 0) params.offsets[slot] = entry;
  for (int base = 0; base < tile.index; base += 32) {
    const int key_tile = base + lane;
    bool listed = false;
    if (key_tile < tile.index) {
      const int found = search(key_tile);
      listed = found < offsets[key_tile + 1] && query_tiles[found] == tile.index;
    }
    const unsigned all = __ballot_sync(0xffffffffu, listed);
    if (listed) params.tiles[entry + __popc(all & ((1u << lane) - 1))] = key_tile;
    entry += __popc(all);
  }
}

}  // namespace

void launch_query_lists(const QueryListsParams& params, cudaStream_t stream) {
  constexpr int kWarps = kThreads / 32;
  launch("attention_backward", query_lists_kernel, static_cast<unsigned>((params.slots + kWarps) / kWarps), kThreads, 0,
         stream, params);
}

}  // namespace lemo::cuda::attention::sm80
