// From sums per probe row and key tile to the mean attention mass of key tiles, in two stages with a fixed order.
#pragma once

#include "common/document_tiles.cuh"
#include "common/mma.cuh"
#include "common/vector.cuh"
#include "tiles/params.h"

namespace lemo::cuda::tiling {

constexpr int kReduceThreads = 256;

// log2 of the sum of 2^x over a row's values, given one after the other by at(0) to at(count - 1).
template <class At>
__device__ __forceinline__ float log2_sum(int count, At at) {
  float top = -INFINITY, sum = 0.0f;
#pragma unroll 8
  for (int i = 0; i < count; ++i) top = max_nan(top, at(i));
  const float exponent = top == -INFINITY ? 0.0f : top;
#pragma unroll 8
  for (int i = 0; i < count; ++i) sum += exp2_fast(at(i) - exponent);
  return exponent + log2f(sum);
}

// `sums` of chunk blockIdx.y of the query tile in slot blockIdx.x. Neighboring threads read neighboring probe rows; if
// these are few, groups of threads take every groups-th tile.
__global__ void __launch_bounds__(kReduceThreads) sum_chunks(const __grid_constant__ ScoreParams params) {
  __shared__ float group_sums[kReduceThreads];
  const int slot = static_cast<int>(blockIdx.x), chunk = static_cast<int>(blockIdx.y);
  const Tile tile = locate_tile(params.documents, kTile, static_cast<int>(params.first_slot + slot));
  const int begin = chunk * kChunk, end = min(begin + kChunk, tile.index + 1);
  if (tile.index >= tile.count || begin >= end) return;
  const int rows = params.heads * params.probes;
  const float* partial = params.partial + (static_cast<int64_t>(slot) * params.key_tiles + begin) * rows;
  float* sums = params.sums + (static_cast<int64_t>(slot) * params.chunks + chunk) * rows;
  const int lanes = min(rows, kReduceThreads), groups = kReduceThreads / lanes;
  const int group = static_cast<int>(threadIdx.x) / lanes, lane = static_cast<int>(threadIdx.x) % lanes;
  for (int first = 0; first < rows; first += lanes) {
    const int row = first + lane;
    float sum = -INFINITY;
    if (row < rows && group < groups) {
      const int count = (end - begin - group + groups - 1) / groups;
      sum = log2_sum(count, [&](int i) { return partial[static_cast<int64_t>(i * groups + group) * rows + row]; });
    }
    __syncthreads();  // the previous rows' sums have been read
    group_sums[threadIdx.x] = sum;
    __syncthreads();
    if (row < rows && group == 0) {
      sums[row] = log2_sum(groups, [&](int i) { return group_sums[i * lanes + lane]; });
    }
  }
}

// Scores of the key tiles of chunk blockIdx.y, for the query tile in slot blockIdx.x. A warp sums the rows of every
// eighth tile.
__global__ void __launch_bounds__(kReduceThreads) mean_masses(const __grid_constant__ ScoreParams params) {
  constexpr int kWarps = kReduceThreads / 32, kWarpTiles = kChunk / kWarps, kCached = 1024;
  __shared__ float row_sums[kCached];
  const int slot = static_cast<int>(blockIdx.x), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * kChunk;
  const Tile tile = locate_tile(params.documents, kTile, static_cast<int>(params.first_slot + slot));
  const int seen = tile.index < tile.count && tile.index >= begin ? static_cast<int>(tile.index - begin) + 1 : 0;
  float masses[kWarpTiles];
#pragma unroll
  for (int i = 0; i < kWarpTiles; ++i) masses[i] = 0.0f;
  if (seen > 0) {
    const int rows = params.heads * params.probes, chunks = tile.index / kChunk + 1;
    const float* partial = params.partial + (static_cast<int64_t>(slot) * params.key_tiles + begin) * rows;
    const float* sums = params.sums + static_cast<int64_t>(slot) * params.chunks * rows;
    for (int first = 0; first < rows; first += kCached) {
      const int cached = min(kCached, rows - first);
      __syncthreads();
      for (int row = threadIdx.x; row < cached; row += kReduceThreads) {
        row_sums[row] = log2_sum(chunks, [&](int i) { return sums[static_cast<int64_t>(i) * rows + first + row]; });
      }
      __syncthreads();
      for (int row = lane; row < cached; row += 32) {
        const float sum = row_sums[row];
#pragma unroll
        for (int i = 0; i < kWarpTiles; ++i) {
          const int n = i * kWarps + warp;
          if (n < seen) masses[i] += exp2_fast(partial[static_cast<int64_t>(n) * rows + first + row] - sum);
        }
      }
    }
  }
  const float weight = 1.0f / (static_cast<float>(params.heads) * static_cast<float>(params.probes));
  float* scores = params.scores + slot * params.scores_stride + begin;
#pragma unroll
  for (int i = 0; i < kWarpTiles; ++i) {
    const float mass = warp_sum(masses[i]) * weight;
    const int n = i * kWarps + warp;
    if (lane == 0 && begin + n < params.width) scores[n] = mass;
  }
}

}  // namespace lemo::cuda::tiling
