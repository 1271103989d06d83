// The choice as lists: count, scan, fill. Lists by key tile are made from blocks of 32 x 32 bits, which a warp
// transposes; the warp of every 32nd tile of a document walks the query tiles behind it.
#pragma once

#include <cub/block/block_scan.cuh>

#include "common/document_tiles.cuh"
#include "common/vector.cuh"
#include "tiles/params.h"

namespace lemo::cuda::tiling {

constexpr int kListThreads = 128;
constexpr int kScanThreads = 1024;
constexpr int kScanItems = 4;

struct ListParams {
  const int32_t* chosen;
  int64_t chosen_stride;
  int32_t words;
  Documents documents;
  int32_t slots;
  int64_t capacity;  // entries of either list
  int32_t* offsets;
  int32_t* tiles;
  int32_t* transposed_offsets;
  int32_t* transposed_tiles;
};

// Word `word` of the query tile in `slot`; bits that do not name a tile below tile `own` are left out.
__device__ __forceinline__ uint32_t word_of(const ListParams& params, int64_t slot, int own, int word) {
  const int below = own - word * 32;
  if (below <= 0 || word >= params.words) return 0;
  const uint32_t bits = static_cast<uint32_t>(params.chosen[slot * params.chosen_stride + word]);
  return below >= 32 ? bits : bits & ((1u << below) - 1u);
}

// Column `lane` of 32 x 32 bits, of which each lane holds a row.
__device__ __forceinline__ uint32_t transpose_bits(uint32_t row, int lane) {
  uint32_t column = 0;
#pragma unroll
  for (int bit = 0; bit < 32; ++bit) {
    const uint32_t votes = __ballot_sync(kFullWarp, (row >> bit & 1u) != 0);
    if (lane == bit) column = votes;
  }
  return column;
}

// Appends first + the number of every bit that is set to a list, up to its capacity.
__device__ __forceinline__ void append(int32_t* tiles, int64_t capacity, int64_t& at, uint32_t bits, int first) {
  for (; bits != 0 && at < capacity; bits &= bits - 1) tiles[at++] = first + __ffs(static_cast<int>(bits)) - 1;
}

// Calls take(bits, m) for the key tiles of word tile.index / 32 of a document: bit i of `bits`, of the lane's key tile,
// says that query tile m + i attends to it. m ascends.
template <class Take>
__device__ __forceinline__ void walk_columns(const ListParams& params, const Tile& tile, int64_t base, int lane,
                                             Take take) {
  constexpr int kAhead = 4;  // loads in flight
  const int word = tile.index / 32;
  for (int begin = word * 32; begin < tile.count; begin += kAhead * 32) {
    uint32_t rows[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int m = begin + i * 32 + lane;
      rows[i] = m < tile.count ? word_of(params, base + m, m, word) : 0;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (__any_sync(kFullWarp, rows[i] != 0)) take(transpose_bits(rows[i], lane), begin + i * 32);
    }
  }
}

// One warp per slot: the lengths of both lists, where their offsets will be.
__global__ void __launch_bounds__(kListThreads) count_tiles(const __grid_constant__ ListParams params) {
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * (kListThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (slot >= params.slots) return;
  const Tile tile = locate_tile(params.documents, kTile, static_cast<int>(slot));
  if (tile.index >= tile.count) {
    if (lane == 0) params.offsets[slot] = params.transposed_offsets[slot] = 0;
    return;
  }
  int count = 0;
  for (int word = lane; word * 32 < tile.index; word += 32) count += __popc(word_of(params, slot, tile.index, word));
  count = __reduce_add_sync(kFullWarp, count);
  if (lane == 0) params.offsets[slot] = count;
  if (tile.index % 32 != 0) return;
  count = 0;
  walk_columns(params, tile, slot - tile.index, lane, [&](uint32_t bits, int) { count += __popc(bits); });
  if (tile.index + lane < tile.count) params.transposed_offsets[slot + lane] = count;
}

// Two thread blocks, one for either list: lengths become offsets. Lists end at the capacity.
__global__ void __launch_bounds__(kScanThreads) scan_counts(const __grid_constant__ ListParams params) {
  using Scan = cub::BlockScan<unsigned long long, kScanThreads, cub::BLOCK_SCAN_WARP_SCANS>;
  __shared__ typename Scan::TempStorage storage;
  int32_t* offsets = blockIdx.x == 0 ? params.offsets : params.transposed_offsets;
  const auto cut = [&](unsigned long long offset) {
    return static_cast<int32_t>(min(offset, static_cast<unsigned long long>(params.capacity)));
  };
  unsigned long long done = 0;
  for (int64_t base = 0; base < params.slots; base += kScanThreads * kScanItems) {
    const int64_t begin = base + static_cast<int64_t>(threadIdx.x) * kScanItems;
    unsigned long long lengths[kScanItems], total;
#pragma unroll
    for (int i = 0; i < kScanItems; ++i) {
      lengths[i] = begin + i < params.slots ? static_cast<unsigned long long>(offsets[begin + i]) : 0;
    }
    Scan(storage).ExclusiveSum(lengths, lengths, total);
#pragma unroll
    for (int i = 0; i < kScanItems; ++i) {
      if (begin + i < params.slots) offsets[begin + i] = cut(done + lengths[i]);
    }
    done += total;
    __syncthreads();
  }
  if (threadIdx.x == 0) offsets[params.slots] = cut(done);
}

// One warp per slot: its list, and those of 32 key tiles. All threads share the zeros behind the lists.
__global__ void __launch_bounds__(kListThreads) fill_lists(const __grid_constant__ ListParams params) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kListThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kListThreads, slot = thread / 32;
  const int lane = threadIdx.x % 32;
  for (int64_t i = params.offsets[params.slots] + thread; i < params.capacity; i += threads) params.tiles[i] = 0;
  for (int64_t i = params.transposed_offsets[params.slots] + thread; i < params.capacity; i += threads) {
    params.transposed_tiles[i] = 0;
  }
  if (slot >= params.slots) return;
  const Tile tile = locate_tile(params.documents, kTile, static_cast<int>(slot));
  if (tile.index >= tile.count) return;
  int64_t at = params.offsets[slot];
  for (int first = 0; first * 32 < tile.index; first += 32) {
    const uint32_t bits = word_of(params, slot, tile.index, first + lane);
    int before = __popc(bits);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kFullWarp, before, step);
      if (lane >= step) before += other;
    }
    int64_t own = at + before - __popc(bits);
    append(params.tiles, params.capacity, own, bits, (first + lane) * 32);
    at += __shfl_sync(kFullWarp, before, 31);
  }
  if (tile.index % 32 != 0) return;
  int64_t column = tile.index + lane < tile.count ? params.transposed_offsets[slot + lane] : params.capacity;
  walk_columns(params, tile, slot - tile.index, lane,
               [&](uint32_t bits, int m) { append(params.transposed_tiles, params.capacity, column, bits, m); });
}

}  // namespace lemo::cuda::tiling
