// Forward pass: a block owns kQueries queries of one head and walks their keys from the diagonal down to the first.
#pragma once

#include "attention/aligned_rows.cuh"
#include "attention/params.h"
#include "attention/sm80/forward_config.h"
#include "attention/sm80/listed_rows.cuh"
#include "attention/sm80/online_softmax.cuh"
#include "attention/sm80/score_options.cuh"
#include "common/launch.h"
#include "common/sm80/mma_tile.cuh"

namespace lemo::cuda::attention::sm80 {

using namespace cuda::sm80;  // common/sm80

// kSplit: keys have separate rows. kListed: there are tile lists, and rows within the loop are the numbers of
// ListedKeys. kOptions: there may be a window (without lists) or a soft-cap. Without them, registers are not spent on
// any.
template <typename T, int kHeadDim, bool kSplit, bool kListed, bool kOptions>
__global__ void __launch_bounds__(ForwardConfig<kHeadDim, kOptions>::kWarps * 32)
    forward_kernel(const __grid_constant__ ForwardParams params) {
  using Config = ForwardConfig<kHeadDim, kOptions>;
  constexpr int kThreads = Config::kWarps * 32;
  constexpr int kQueries = Config::kQueries, kKeys = Config::kKeys;
  constexpr int kRowTiles = kQueries / Config::kWarps / 16;
  constexpr int kWarpRows = kRowTiles * 16;
  // A warp skips key tiles beyond its rows; no row is then fully masked in the tiles it visits.
  static_assert(kKeys % kWarpRows == 0);
  static_assert(!kListed || (!kSplit && kQueries == LEMO_TILE_ROWS));
  using QueryLoader = TileLoader<T, kQueries, kHeadDim, kThreads, kSplit>;
  using KeyLoader = TileLoader<T, kKeys, kHeadDim, kThreads>;
  constexpr int kPitch = KeyLoader::kPitch;

  const QueryTile located = locate_queries<kAlignedRows, kSplit>(params.documents, params.key_documents, kQueries,
                                                                 static_cast<int>(blockIdx.x / params.heads));
  const Tile& tile = located.tile;
  if (tile.index >= tile.count) return;
  const Tile own_keys = {located.document.key_start, tile.length, 0, 0, kUncut};
  __shared__ Tile stored;  // the loop has no registers to spare for it
  constexpr bool kStored = kSplit || kListed;
  if (kStored && threadIdx.x == 0) stored = tile;
  const Tile& query_rows = choose<kStored>(stored, tile);
  const Tile& key_rows = choose<kListed>(stored, own_keys);  // with lists, they are the same rows
  // The tiles with the most keys start first.
  const int query_start = (tile.count - 1 - tile.index) * kQueries;
  const int head = blockIdx.x % params.heads;
  const int key_head = head / params.group;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __shared__ ListedKeys listed;
  if constexpr (kListed) {
    if (threadIdx.x == 0) {
      const int index = tile.count - 1 - tile.index;
      const int slot = static_cast<int>(blockIdx.x / params.heads) - tile.index + index;
      listed = ListedKeys(params.lists, slot, tile, index);
    }
    __syncthreads();
  }
  const int first_query = kListed ? listed.own : query_start;
  const int warp_start = first_query + warp * kWarpRows;

  extern __shared__ __align__(16) unsigned char shared[];
  const uint32_t queries = shared_address(shared);
  const uint32_t keys = queries + QueryLoader::kElements * 2;
  const uint32_t values = keys + KeyLoader::kElements * 2;
  const LaneOffset by_row = lane_offset_rows_first(lane), by_column = lane_offset_columns_first(lane);
  const uint32_t query_lane = queries + ((warp * kWarpRows + by_row.row) * kPitch + by_row.column) * 2;
  const uint32_t key_lane = keys + (by_column.row * kPitch + by_column.column) * 2;
  const uint32_t value_lane = values + (by_row.row * kPitch + by_row.column) * 2;

  [[maybe_unused]] const DocumentPlaces query_places = {params.options.places, tile.start, max(tile.first, 0),
                                                        tile.length};
  [[maybe_unused]] const DocumentPlaces key_places = {params.options.key_places, own_keys.start,
                                                      -located.document.ahead, tile.length};
  // With a window: the first key tile that any query sees, and the first key that all see.
  __shared__ int windowed_last_tile, all_see;
  const int first_tile = -located.document.ahead / kKeys;
  if constexpr (kOptions) {
    if (kListed || params.options.window == 0) {
      if (threadIdx.x == 0) {
        windowed_last_tile = first_tile;
        all_see = INT_MIN;
      }
    } else if (warp < 2) {  // one for each
      const int row = warp == 0 ? query_start : query_start + kQueries - 1;
      const int first = key_places.first_from(query_places.nearest(row) - (params.options.window - 1));
      if (lane == 0) {
        (warp == 0 ? windowed_last_tile : all_see) =
            warp == 0 ? first_tile + (first - first_tile * kKeys) / kKeys : first;
      }
    }
    __syncthreads();
  }
  const int& last_tile = choose<kOptions>(windowed_last_tile, first_tile);
  const int key_end = kListed ? listed.end : min(query_start + kQueries, tile.length);
  int key_tile = (key_end + kKeys - 1) / kKeys - 1;
  {
    QueryLoader loader;
    loader.find_rows(params.documents, tile, query_start);
    loader.load(queries, head_pointer<T>(params.q, head), params.q.row_stride);
  }
  KeyLoader loader;
  const auto find_keys = [&](int number) {
    loader.find_rows(params.key_documents, key_rows, kListed ? listed.row(number) : number);
  };
  find_keys(key_tile * kKeys);
  loader.load(keys, head_pointer<T>(params.k, key_head), params.k.row_stride);
  copy_async_commit();

  uint32_t query_fragments[Config::kQueriesInRegisters ? kHeadDim / 16 : 1][kRowTiles][4];
  if constexpr (Config::kQueriesInRegisters) {
    copy_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        load_matrices(query_fragments[k][i], query_lane + (i * 16 * kPitch + k * 16) * 2);
      }
    }
  }

  OnlineSoftmax<kRowTiles> softmax(kOptions ? kLowestWithOptions : -FLT_MAX);
  float out[kRowTiles][kHeadDim / 8][4];
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) clear(out[i]);
  const float scale = kOptions ? exponent_scale(params.options, params.scale) : params.scale;
  const float scale_log2 = scale * kLog2E;

#pragma unroll 1
  for (; key_tile >= last_tile; --key_tile) {
    const int key_start = key_tile * kKeys;
    const bool active = key_start <= warp_start + kWarpRows - 1;
    copy_async_wait<0>();
    __syncthreads();  // the keys have arrived, and the previous values are no longer in use
    loader.load(values, head_pointer<T>(params.v, key_head), params.v.row_stride);
    copy_async_commit();
    if (kListed && key_tile > last_tile)
      find_keys(key_start - kKeys);  // later, with scores, registers would not suffice

    float s[kRowTiles][kKeys / 8][4];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) clear(s[i]);
    if (active) {
#pragma unroll(Config::kQueriesInRegisters ? kHeadDim : kScoreUnroll < kListed || kOptions >)
      for (int k = 0; k < kHeadDim / 16; ++k) {
        uint32_t a[kRowTiles][4];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          if constexpr (Config::kQueriesInRegisters) {
#pragma unroll
            for (int c = 0; c < 4; ++c) a[i][c] = query_fragments[k][i][c];
          } else {
            load_matrices(a[i], query_lane + (i * 16 * kPitch + k * 16) * 2);
          }
        }
#pragma unroll
        for (int n = 0; n < kKeys / 16; ++n) {
          uint32_t b[4];
          load_matrices(b, key_lane + (n * 16 * kPitch + k * 16) * 2);
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) {
            multiply<T>(s[i][2 * n], a[i], b[0], b[1]);
            multiply<T>(s[i][2 * n + 1], a[i], b[2], b[3]);
          }
        }
      }
      if constexpr (kOptions) {
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) soft_cap(s[i], params.options, params.scale);
        if (!kListed && key_start < all_see) {
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int64_t bound =
                  query_places.nearest(warp_start + i * 16 + half * 8 + lane / 4) - params.options.window;
#pragma unroll
              for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                  const int key = key_start + n * 8 + (lane % 4) * 2 + c;
                  if (key_places.nearest(key) <= bound) s[i][n][half * 2 + c] = -INFINITY;
                }
              }
            }
          }
        }
      }
      if (key_start + kKeys - 1 > warp_start) {
        // Keys beyond the document come after every query of it, so that causality masks them too. Key tiles begin
        // where the tiles of queries do (aligned_rows.cuh).
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              const int query = warp_start + i * 16 + (c / 2) * 8 + lane / 4;
              const int key = key_start + n * 8 + (lane % 4) * 2 + c % 2;
              if (key > query) s[i][n][c] = -INFINITY;
            }
          }
        }
      }
    }

    copy_async_wait<0>();
    __syncthreads();  // the values have arrived, and these keys are no longer in use
    if (key_tile > last_tile) {
      if (!kListed) find_keys(key_start - kKeys);
      loader.load(keys, head_pointer<T>(params.k, key_head), params.k.row_stride);
      copy_async_commit();
    }
    if (active) {
      softmax.update(s, out, scale_log2);
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k) {
        uint32_t a[kRowTiles][4];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) pack_fragment<T>(a[i], s[i][2 * k], s[i][2 * k + 1]);
#pragma unroll
        for (int n = 0; n < kHeadDim / 16; ++n) {
          uint32_t b[4];
          load_matrices_transposed(b, value_lane + (k * 16 * kPitch + n * 16) * 2);
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) {
            multiply<T>(out[i][2 * n], a[i], b[0], b[1]);
            multiply<T>(out[i][2 * n + 1], a[i], b[2], b[3]);
          }
        }
      }
    }
  }

  if constexpr (kOptions && !kListed)
    copy_async_wait<0>();  // the first copies, if a window without keys left the loop no turn
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
    float inverse[2], lse[2];
    const int row = warp_start + i * 16 + lane / 4 + (kListed ? listed.own_shift : 0);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      softmax.finish(2 * i + half, scale, inverse[half], lse[half]);
      if (kOptions && isinf(inverse[half])) {  // a window without keys
        inverse[half] = 0.0f;
        lse[half] = -INFINITY;
      }
      if (lane % 4 == 0 && row + half * 8 < query_rows.length && row + half * 8 >= query_rows.first) {
        params.lse[head * params.lse_stride + query_rows.start + row + half * 8] = lse[half];
      }
    }
    store_rows<T>(params.documents, query_rows, params.out, head, row, out[i], inverse[0], inverse[1]);
  }
}

// kOptions as in the kernel.
template <typename T, int kHeadDim, bool kOptions>
void run_forward(const ForwardParams& params, cudaStream_t stream) {
  using Config = ForwardConfig<kHeadDim, kOptions>;
  constexpr int kBytes = (Config::kQueries + 2 * Config::kKeys) * (kHeadDim + kPadding) * 2;
  // Heads fastest: all heads' heaviest tiles start first, which evens out the end of the launch.
  const int64_t slots = query_slots<kAlignedRows>(params.documents, Config::kQueries);
  const auto kernel = params.documents.aligned          ? forward_kernel<T, kHeadDim, true, false, kOptions>
                      : params.lists.offsets != nullptr ? forward_kernel<T, kHeadDim, false, true, kOptions>
                                                        : forward_kernel<T, kHeadDim, false, false, kOptions>;
  launch("attention_forward", kernel, static_cast<unsigned>(slots * params.heads), Config::kWarps * 32, kBytes, stream,
         params);
}

}  // namespace lemo::cuda::attention::sm80
