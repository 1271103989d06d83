// The passes around the backward kernel, one thread block per (query tile, head): row statistics and cleared sums
// before it, dq from the sums after it. Both only move memory.
#pragma once

#include "attention/sm90/backward_lists.cuh"
#include "attention/softmax.cuh"
#include "common/mma.cuh"

namespace lemo::cuda::attention::sm90 {

constexpr int kTileThreads = 256;

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kTileThreads)
    backward_stats_kernel(const __grid_constant__ BackwardKernelParams params) {
  constexpr int kQueries = DqOrder<kHeadDim>::kQueries;
  constexpr int kLanes = kHeadDim == 64 ? 8 : kHeadDim > 128 ? 32 : 16;  // threads per row
  constexpr int kRowsPerPass = kTileThreads / kLanes, kPasses = kQueries / kRowsPerPass;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes;
  const int planners = params.begins != nullptr ? 1 : 0;
  if (static_cast<int>(blockIdx.x) < planners) {
    if (thread < 32) estimate_begins(params);  // which takes no longer than all other thread blocks
    return;
  }
  const int item = static_cast<int>(blockIdx.x) - planners, slot = item / params.heads, head = item % params.heads;
  const QueryTile located = locate_queries<kBackwardKeys>(params.documents, params.key_documents, kQueries, slot);
  const Tile& tile = located.tile;
  if (tile.index >= tile.count) return;
  const int first = tile.index * kQueries + thread / kLanes;
  const bool in_row = lane * 8 < params.head_dim;

  uint4 dout[kPasses], out[kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int row = first + pass * kRowsPerPass;
    dout[pass] = out[pass] = make_uint4(0, 0, 0, 0);
    if (row < tile.length && row >= tile.first && in_row) {
      const int64_t storage = storage_row(params.documents, tile.start + row);
      dout[pass] = *reinterpret_cast<const uint4*>(head_pointer<T>(params.dout_view, head) +
                                                   storage * params.dout_view.row_stride + lane * 8);
      out[pass] = *reinterpret_cast<const uint4*>(head_pointer<T>(params.out_view, head) +
                                                  storage * params.out_view.row_stride + lane * 8);
    }
  }
  float4* sums = reinterpret_cast<float4*>(params.dq_sums + int64_t{item} * DqOrder<kHeadDim>::kSize);
#pragma unroll
  for (int i = 0; i < DqOrder<kHeadDim>::kSize / 4 / kTileThreads; ++i) {
    sums[i * kTileThreads + thread] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
  if (tile.index == 0 && head < params.key_heads && thread == 0) {
    params.sweeps[static_cast<int64_t>(slot) * params.key_heads + head] = Sweep::kNowhere;
  }
  if (params.turns != nullptr && thread == 0) params.turns[item] = 0;
  if (params.first_tiles != nullptr && head == 0 && thread == 0) {
    const Tile keys = {located.document.key_start, tile.length, 0, 0, kUncut};
    params.first_tiles[slot] = first_key_tile<kQueries>(params, keys, -located.document.ahead, tile.index);
  }
  float* stats = params.stats + int64_t{item} * (2 * kQueries);
  if (thread < kQueries) {
    const int row = tile.index * kQueries + thread;
    // exp2(s - infinity) = 0: rows that do not exist, or saw no key, need no mask.
    const bool exists = row < tile.length && row >= tile.first;
    const float lse = exists ? params.lse[head * params.lse_stride + tile.start + row] : -INFINITY;
    stats[thread] = lse == -INFINITY ? INFINITY : lse * kLog2E;
  }
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    float a[8], b[8], sum = 0.0f;
    unpack<T>(dout[pass], a);
    unpack<T>(out[pass], b);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(a[i], b[i], sum);
#pragma unroll
    for (int mask = 1; mask < kLanes; mask *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    if (lane == 0) stats[kQueries + thread / kLanes + pass * kRowsPerPass] = sum;
  }
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kTileThreads)
    backward_dq_kernel(const __grid_constant__ BackwardKernelParams params) {
  using Order = DqOrder<kHeadDim>;
  constexpr int kQueries = Order::kQueries, kChunks = kHeadDim / 8;
  constexpr int kItems = kQueries / 2 * kChunks;  // 8 columns of two rows, 8 apart
  const int slot = static_cast<int>(blockIdx.x / params.heads), head = static_cast<int>(blockIdx.x % params.heads);
  const Tile tile = locate_queries<kBackwardKeys>(params.documents, params.key_documents, kQueries, slot).tile;
  if (tile.index >= tile.count) return;
  const float* sums = params.dq_sums + static_cast<int64_t>(blockIdx.x) * Order::kSize;
#pragma unroll
  for (int i = 0; i < (kItems + kTileThreads - 1) / kTileThreads; ++i) {
    const int item = i * kTileThreads + static_cast<int>(threadIdx.x);
    const int column = item % kChunks, pair = item / kChunks;
    if ((kItems % kTileThreads != 0 && item >= kItems) || column * 8 >= params.head_dim) continue;
    const int warpgroup = Order::kByRows ? pair / 32 : column / Order::chunks(0);
    const int chunk = Order::kByRows ? column : column % Order::chunks(0);
    const int warp = pair / 8 % 4, row_in_warp = pair % 8;
    const float4* source = reinterpret_cast<const float4*>(sums + Order::offset(warpgroup, warp) +
                                                           chunk * Order::kChunkFloats + row_in_warp * 16);
    const float scale = params.scale;
    uint32_t low[4], high[4];
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      const float4 values = source[quarter];
      low[quarter] = pack<T>(values.x * scale, values.y * scale);
      high[quarter] = pack<T>(values.z * scale, values.w * scale);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row =
          tile.index * kQueries + (Order::kByRows ? warpgroup * 64 : 0) + warp * 16 + row_in_warp + half * 8;
      if (row >= tile.length || row < tile.first) continue;
      T* target = head_pointer<T>(params.dq, head) +
                  storage_row(params.documents, tile.start + row) * params.dq.row_stride + column * 8;
      const uint32_t (&values)[4] = half == 0 ? low : high;
      *reinterpret_cast<uint4*>(target) = make_uint4(values[0], values[1], values[2], values[3]);
    }
  }
}

}  // namespace lemo::cuda::attention::sm90
