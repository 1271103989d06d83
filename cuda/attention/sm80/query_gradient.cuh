// dQ in a separate kernel, for deterministic mode: a block owns kQueries queries of one head and walks the keys
// they see.
#pragma once

#include "attention/aligned_rows.cuh"
#include "attention/params.h"
#include "attention/sm80/backward_config.h"
#include "attention/sm80/listed_rows.cuh"
#include "attention/sm80/online_softmax.cuh"
#include "attention/sm80/score_options.cuh"
#include "common/launch.h"
#include "common/sm80/mma_tile.cuh"

namespace lemo::cuda::attention::sm80 {

using namespace cuda::sm80;  // common/sm80

template <int kHeadDim>
struct QueryGradientLayout {
  using Config = QueryGradientConfig<kHeadDim>;
  static constexpr int kPitch = kHeadDim + kPadding;
  static constexpr int kQueryBytes = Config::kQueries * kPitch * 2;
  static constexpr int kKeyBytes = Config::kKeys * kPitch * 2;
  static constexpr int kStage = 2 * kKeyBytes + 2 * Config::kKeys * 4;  // k, v, weights, slots
  static constexpr int kStages = 2 * kQueryBytes;
  static constexpr int kBytes = kStages + 2 * kStage;
};

// kListed: there are tile lists, and rows within the loop are the numbers of ListedKeys.
// kOptions: there may be a window (without lists) or a soft-cap.
template <typename T, int kHeadDim, bool kSplit, bool kListed, bool kOptions>
__global__ void __launch_bounds__(QueryGradientConfig<kHeadDim>::kWarps * 32)
    query_gradient_kernel(const __grid_constant__ BackwardParams params) {
  using Config = QueryGradientConfig<kHeadDim>;
  using Layout = QueryGradientLayout<kHeadDim>;
  constexpr int kThreads = Config::kWarps * 32;
  constexpr int kQueries = Config::kQueries, kKeys = Config::kKeys, kPitch = Layout::kPitch;
  static_assert(kQueries == Config::kWarps * 16);
  constexpr int kParts = LEMO_TILE_ROWS / kQueries;  // tiles of this kernel in one of the lists
  static_assert(!kListed || (!kSplit && kParts * kQueries == LEMO_TILE_ROWS));

  const QueryTile located = locate_queries<kAlignedRows, kSplit>(params.documents, params.key_documents, kQueries,
                                                                 static_cast<int>(blockIdx.x / params.heads));
  if (located.tile.index >= located.tile.count) return;
  const FromFirstKey rows = count_from_first_key(located);
  const Tile& tile = rows.queries;
  // The loop has no registers to spare: with more than 128, head_dim 64 would lose its second block per multiprocessor.
  constexpr bool kStored = kSplit || kListed;
  __shared__ FromFirstKey stored;
  __shared__ ListedKeys listed;
  if constexpr (kStored) {
    if (threadIdx.x == 0) {
      stored = rows;
      if constexpr (kListed) {
        const int index = tile.count - 1 - tile.index;
        int slot = static_cast<int>(blockIdx.x / params.heads) - tile.index;  // of the document's first tile
        if constexpr (kParts > 1) slot += tile.start / LEMO_TILE_ROWS - tile.start / kQueries;
        slot += index / kParts;
        listed = ListedKeys({params.query_list_offsets, params.query_list_tiles}, slot, tile, index / kParts);
        if constexpr (kParts > 1) listed.end = min(listed.end, listed.own + (index % kParts + 1) * kQueries);
      }
    }
    __syncthreads();
  }
  const Tile &query_rows = choose<kStored>(stored, rows).queries, &key_rows = choose<kStored>(stored, rows).keys;
  const int tile_start = (tile.count - 1 - tile.index) * kQueries + located.document.ahead;
  const int query_start = kListed ? listed.own + (kParts > 1 ? tile_start % LEMO_TILE_ROWS : 0) : tile_start;
  const int head = blockIdx.x % params.heads, key_head = head / params.group;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  extern __shared__ __align__(16) unsigned char shared[];
  const uint32_t base = shared_address(shared);
  const LaneOffset by_row = lane_offset_rows_first(lane), by_column = lane_offset_columns_first(lane);
  const uint32_t by_row_bytes = (by_row.row * kPitch + by_row.column) * 2;
  const uint32_t by_column_bytes = (by_column.row * kPitch + by_column.column) * 2;
  const uint32_t query_lane = base + warp * 16 * kPitch * 2 + by_row_bytes;
  const uint32_t dout_lane = query_lane + Layout::kQueryBytes;

  TileLoader<T, kKeys, kHeadDim, kThreads> loader;
  const auto load_keys = [&](int number, int stage) {
    const int key_start = kListed ? listed.row(number) : number;
    const uint32_t offset = Layout::kStages + stage * Layout::kStage;
    loader.find_rows(params.key_documents, key_rows, key_start);
    loader.load(base + offset, head_pointer<T>(params.k, key_head), params.k.row_stride);
    loader.load(base + offset + Layout::kKeyBytes, head_pointer<T>(params.v, key_head), params.v.row_stride);
    copy_async_commit();
    if (params.key_weights != nullptr && threadIdx.x < kKeys) {
      const int key = key_start + static_cast<int>(threadIdx.x);
      const int slot = key < key_rows.length ? params.key_row_slots[key_rows.start + key] : 0;
      float* row_values = reinterpret_cast<float*>(shared + offset + 2 * Layout::kKeyBytes) + threadIdx.x;
      row_values[0] = params.key_weights[slot];
      reinterpret_cast<int*>(row_values)[kKeys] = slot;
    }
  };

  {
    TileLoader<T, kQueries, kHeadDim, kThreads, kSplit> query_loader;
    query_loader.find_rows(params.documents, tile, tile_start);
    query_loader.load(base, head_pointer<T>(params.q, head), params.q.row_stride);
    query_loader.load(base + Layout::kQueryBytes, head_pointer<T>(params.dout, head), params.dout.row_stride);
  }
  const int own_end = min(tile_start + kQueries, tile.length);
  const int& key_end = choose<kListed>(listed.end, own_end);
  int first_key = 0;
  // The first key that every query of the tile sees.
  [[maybe_unused]] int all_see = INT_MIN;
  [[maybe_unused]] const DocumentPlaces query_places = {params.options.places, tile.start, max(tile.first, 0),
                                                        tile.length};
  [[maybe_unused]] const DocumentPlaces key_places = {params.options.key_places, rows.keys.start, 0, tile.length};
  if constexpr (kOptions && !kListed) {
    if (params.options.window != 0) {
      const int64_t reach = params.options.window - 1;
      first_key = key_places.first_from(query_places.nearest(tile_start) - reach) / kKeys * kKeys;
      all_see = key_places.first_from(query_places.nearest(tile_start + kQueries - 1) - reach);
    }
  }
  load_keys(first_key, 0);

  // This thread's queries: `query` and query + 8.
  const int query = query_start + warp * 16 + lane / 4;
  float lse_log2[2] = {0.0f, 0.0f}, delta[2] = {0.0f, 0.0f};
  int slots[2] = {0, 0};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = query + half * 8 + (kListed ? listed.own_shift : 0);
    if (row >= tile.length || row < tile.first) continue;
    const int packed_row = tile.start + row;
    const float lse = params.lse[head * params.lse_stride + packed_row];
    lse_log2[half] = (kOptions ? closed_lse(lse) : lse) * kLog2E;
    delta[half] = params.delta[head * params.documents.capacity + packed_row];
    if (params.key_weights != nullptr) slots[half] = params.row_slots[packed_row];
  }

  float dq[kHeadDim / 8][4];
  clear(dq);
  const float scale_log2 = (kOptions ? exponent_scale(params.options, params.scale) : params.scale) * kLog2E;
  int stage = 0;
#pragma unroll 1
  for (int key_start = first_key; key_start < key_end; key_start += kKeys) {
    copy_async_wait<0>();
    __syncthreads();  // this stage has arrived, and the other one is no longer in use
    if (key_start + kKeys < key_end) load_keys(key_start + kKeys, stage ^ 1);
    const uint32_t offset = Layout::kStages + stage * Layout::kStage;
    const uint32_t keys = base + offset, values = keys + Layout::kKeyBytes;
    const float* row_values = reinterpret_cast<const float*>(shared + offset + 2 * Layout::kKeyBytes);
    stage ^= 1;

    float p[kKeys / 8][4], ds[kKeys / 8][4];
    clear(p);
    clear(ds);
    multiply_rows<T, kKeys, kHeadDim, kPitch>(p, query_lane, keys + by_column_bytes);
    const auto multiply_values = [&] {
      multiply_rows<T, kKeys, kHeadDim, kPitch>(ds, dout_lane, values + by_column_bytes);
    };
    if constexpr (kOptions) {
      multiply_values();
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) ds[n][c] -= delta[c / 2];
      }
      soft_cap(p, ds, params.options, params.scale);
      if (!kListed && key_start < all_see) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t bound = query_places.nearest(query + half * 8) - params.options.window;
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              if (key_places.nearest(key_start + n * 8 + lane % 4 * 2 + c) <= bound) p[n][half * 2 + c] = -INFINITY;
            }
          }
        }
      }
    }
    if (key_start + kKeys - 1 > query_start) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int key = key_start + n * 8 + lane % 4 * 2 + c % 2;
          if (key > query + c / 2 * 8) p[n][c] = -INFINITY;
        }
      }
    }
    if constexpr (!kOptions) multiply_values();
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        p[n][c] = exp2_fast(fmaf(p[n][c], scale_log2, -lse_log2[c / 2]));
        ds[n][c] = p[n][c] * (kOptions ? ds[n][c] : ds[n][c] - delta[c / 2]);
      }
    }
    if (params.key_weights != nullptr) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        const int column = n * 8 + lane % 4 * 2;
        const float2 weight = *reinterpret_cast<const float2*>(row_values + column);
        const int2 slot = *reinterpret_cast<const int2*>(row_values + kKeys + column);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if ((c % 2 == 0 ? slot.x : slot.y) != slots[c / 2]) ds[n][c] *= c % 2 == 0 ? weight.x : weight.y;
        }
      }
    }
    multiply_fragments<T, kHeadDim, kKeys, kPitch>(dq, ds, keys + by_row_bytes);
  }
  if constexpr (kOptions && !kListed) copy_async_wait<0>();  // the first copies, if a window without keys left no turn
  store_rows<T>(params.documents, query_rows, params.dq, kStored ? static_cast<int>(blockIdx.x % params.heads) : head,
                query + (kListed ? listed.own_shift : 0), dq, params.scale, params.scale);
}

}  // namespace lemo::cuda::attention::sm80
