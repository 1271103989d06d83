// From sums per probe row and key tile to the attention mass of key tiles, mean and maximum over heads, in two stages
// with a fixed order.
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

__device__ __forceinline__ float warp_max_nan(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v = max_nan(v, __shfl_xor_sync(kFullWarp, v, offset));
  return v;
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

// Scores and peaks of the key tiles of chunk blockIdx.y, for the query tile in slot blockIdx.x. A warp takes every
// eighth tile; each of its lanes has every 32nd head and sums that head's probes.
__global__ void __launch_bounds__(kReduceThreads) sum_masses(const __grid_constant__ ScoreParams params) {
  constexpr int kWarps = kReduceThreads / 32, kWarpTiles = kChunk / kWarps, kCached = 4096;
  __shared__ float row_sums[kCached];
  const int slot = static_cast<int>(blockIdx.x), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * kChunk;
  const Tile tile = locate_tile(params.documents, kTile, static_cast<int>(params.first_slot + slot));
  const int seen = tile.index < tile.count && tile.index >= begin ? static_cast<int>(tile.index - begin) + 1 : 0;
  float masses[kWarpTiles], peaks[kWarpTiles];
#pragma unroll
  for (int i = 0; i < kWarpTiles; ++i) masses[i] = peaks[i] = 0.0f;
  if (seen > 0) {
    const int group = params.group, probes = params.probes, rows = params.heads * probes;
    const int chunks = tile.index / kChunk + 1, cached_heads = kCached / probes;
    const auto row_of = [&](int head, int probe) { return (head / group * probes + probe) * group + head % group; };
    const float* partial = params.partial + (static_cast<int64_t>(slot) * params.key_tiles + begin) * rows;
    const float* sums = params.sums + static_cast<int64_t>(slot) * params.chunks * rows;
    for (int first = 0; first < params.heads; first += cached_heads) {
      const int heads = min(cached_heads, params.heads - first);
      __syncthreads();
      for (int i = threadIdx.x; i < heads * probes; i += kReduceThreads) {  // [probe][head]
        const int row = row_of(first + i % heads, i / heads);
        row_sums[i] = log2_sum(chunks, [&](int c) { return sums[static_cast<int64_t>(c) * rows + row]; });
      }
      __syncthreads();
      for (int head = lane; head < heads; head += 32) {
        const float* row = partial + row_of(first + head, 0);
#pragma unroll
        for (int i = 0; i < kWarpTiles; ++i) {
          const int n = i * kWarps + warp;
          if (n >= seen) continue;
          float mass = 0.0f;
#pragma unroll 4
          for (int probe = 0; probe < probes; ++probe) {
            mass += exp2_fast(row[static_cast<int64_t>(n) * rows + probe * group] - row_sums[probe * heads + head]);
          }
          masses[i] += mass;
          peaks[i] = max_nan(peaks[i], mass);
        }
      }
    }
  }
  const float probe_weight = 1.0f / static_cast<float>(params.probes);
  const float weight = probe_weight / static_cast<float>(params.heads);
  float* scores = params.scores + slot * params.scores_stride + begin;
  float* tops = params.peaks == nullptr ? nullptr : params.peaks + slot * params.peaks_stride + begin;
#pragma unroll
  for (int i = 0; i < kWarpTiles; ++i) {
    const float mass = warp_sum(masses[i]) * weight, peak = warp_max_nan(peaks[i]) * probe_weight;
    const int n = i * kWarps + warp;
    if (lane != 0 || begin + n >= params.width) continue;
    scores[n] = mass;
    if (tops != nullptr) tops[n] = peak;
  }
}

}  // namespace lemo::cuda::tiling
