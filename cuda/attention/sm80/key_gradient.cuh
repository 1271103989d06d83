// dK and dV (and dQ through fp32 additions): a block owns kKeys keys of one key head and walks the queries that see
// them, of every query head of the group. Scores are computed transposed, [keys, queries]: a warp's P and dS are then
// the left operands of its own dV and dK products, straight from registers, and no two blocks share a sum.
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

__device__ __forceinline__ void add_pair(float* target, float x, float y) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};\n" ::"l"(target), "f"(x), "f"(y) : "memory");
#else
  atomicAdd(target, x);
  atomicAdd(target + 1, y);
#endif
}

template <typename T>
__device__ __forceinline__ TensorView from_column(const TensorView& tensor, int column) {
  return {static_cast<T*>(tensor.data) + column, tensor.row_stride, tensor.head_stride};
}

// Shared memory of a block, in bytes from its start.
template <int kHeadDim, bool kOptions>
struct KeyGradientLayout {
  using Config = KeyGradientConfig<kHeadDim, kOptions>;
  static constexpr int kPitch = kHeadDim + kPadding;
  static constexpr int kScorePitch = Config::kQueries + kPadding;
  static constexpr int kQueryBytes = Config::kQueries * kPitch * 2;
  static constexpr int kKeyBytes = Config::kKeys * kPitch * 2;
  static constexpr int kStage = 2 * kQueryBytes + 3 * Config::kQueries * 4;  // q, dout, lse, delta, slots
  static constexpr int kValues = kKeyBytes;
  static constexpr int kStages = 2 * kKeyBytes;
  static constexpr int kScores = kStages + 2 * kStage;
  static constexpr int kBytes = kScores + Config::kKeys * kScorePitch * 2;
};

// kOptions: there may be a window (without lists) or a soft-cap.
template <typename T, int kHeadDim, bool kSplit, bool kListed, bool kOptions>
__global__ void __launch_bounds__(KeyGradientConfig<kHeadDim, kOptions>::kWarps * 32)
    key_gradient_kernel(const __grid_constant__ BackwardParams params) {
  using Config = KeyGradientConfig<kHeadDim, kOptions>;
  using Layout = KeyGradientLayout<kHeadDim, kOptions>;
  constexpr int kThreads = Config::kWarps * 32;
  constexpr int kQueries = Config::kQueries, kKeys = Config::kKeys, kPitch = Layout::kPitch;
  constexpr int kParts = Config::kColumnParts, kPartColumns = kHeadDim / kParts;
  static_assert(kKeys == Config::kWarps * 16 && Config::kDqRowWarps * Config::kDqColumnWarps == Config::kWarps);
  static_assert(2 * kQueries <= kThreads);
  static_assert(!(kSplit && kListed) && (!kListed || LEMO_TILE_ROWS % kKeys == 0));
  using QueryLoader = TileLoader<T, kQueries, kHeadDim, kThreads, kSplit>;
  using KeyLoader = TileLoader<T, kKeys, kHeadDim, kThreads>;

  // The first tile of a document has the most queries and starts first.
  const int slot = static_cast<int>(blockIdx.x / kParts / params.key_heads);
  const int document = locate_document(params.key_documents, kKeys, 1, slot);
  const AlignedDocument aligned =
      align_document<kAlignedRows, kSplit>(params.documents, params.key_documents, document);
  const int key_start = (slot - (params.key_documents.cu_seqlens[document] / kKeys + document)) * kKeys - aligned.ahead;
  if (key_start >= aligned.length) return;
  // What the loop has no registers to spare for.
  __shared__ Tile stored_keys;
  __shared__ int stored_first;
  constexpr bool kWindow = kOptions && !kListed;
  __shared__ DocumentPlaces stored_query_places, stored_key_places;
  const Tile own_keys = {aligned.key_start, aligned.length, 0, 0, kUncut};
  const DocumentPlaces own_query_places = {params.options.places, aligned.query_start, max(aligned.first, 0),
                                           aligned.length};
  const DocumentPlaces own_key_places = {params.options.key_places, aligned.key_start, -aligned.ahead, aligned.length};
  if constexpr (kSplit) {
    if (threadIdx.x == 0) {
      stored_keys = own_keys;
      stored_first = aligned.first;
      if constexpr (kWindow) {
        stored_query_places = own_query_places;
        stored_key_places = own_key_places;
      }
    }
    __syncthreads();
  }
  [[maybe_unused]] const DocumentPlaces& query_places = choose<kSplit>(stored_query_places, own_query_places);
  [[maybe_unused]] const DocumentPlaces& key_places = choose<kSplit>(stored_key_places, own_key_places);
  const Tile& key_rows = choose<kSplit>(stored_keys, own_keys);
  const int& first_row = choose<kSplit>(stored_first, aligned.first);  // of the queries
  const int length = aligned.length, query_base = aligned.query_start;
  const auto query_rows = [&] { return Tile{query_base, length, 0, 0, first_row}; };
  const int key_head = blockIdx.x / kParts % params.key_heads;
  const int first_column = blockIdx.x % kParts * kPartColumns;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  extern __shared__ __align__(16) unsigned char shared[];
  const uint32_t base = shared_address(shared);
  const LaneOffset by_row = lane_offset_rows_first(lane), by_column = lane_offset_columns_first(lane);
  const uint32_t by_row_bytes = (by_row.row * kPitch + by_row.column) * 2;
  const uint32_t by_column_bytes = (by_column.row * kPitch + by_column.column) * 2;
  const uint32_t key_lane = base + warp * 16 * kPitch * 2 + by_row_bytes;
  const uint32_t value_lane = key_lane + Layout::kValues;

  const int first_query = max(key_start, 0) / kQueries * kQueries;
  ListedQueries<kQueries> listed{};
  if constexpr (kListed) {
    // A tile of the lists may be two of this kernel.
    const int first_slot = params.key_documents.cu_seqlens[document] / LEMO_TILE_ROWS + document;
    listed = ListedQueries<kQueries>(params.lists, first_slot + key_start / LEMO_TILE_ROWS);
  }
  const auto query_after = [&](int row, int& entry) {
    if constexpr (kListed) return listed.after(row, entry);
    return row + kQueries;
  };
  // With a window: the end of the queries that see any of the keys, and the first query that does not see all of them.
  __shared__ int windowed_query_end, some_hidden;
  if constexpr (kWindow) {
    if (params.options.window == 0) {
      if (threadIdx.x == 0) {
        windowed_query_end = length;
        some_hidden = INT_MAX;
      }
    } else if (warp < 2) {  // one for each
      const int row = warp == 0 ? key_start + kKeys - 1 : key_start;
      const int first = query_places.first_from(key_places.nearest(row) + params.options.window);
      if (lane == 0) (warp == 0 ? windowed_query_end : some_hidden) = first;
    }
    __syncthreads();
  }
  const int& query_end = choose<kWindow>(windowed_query_end, length);
  const int first_entry = listed.begin;
  int next_query = first_query, next_entry = first_entry, next_head = key_head * params.group;
  QueryLoader loader;
  const auto load_next = [&](int stage) {
    const uint32_t target = base + Layout::kStages + stage * Layout::kStage;
    loader.load(target, head_pointer<T>(params.q, next_head), params.q.row_stride);
    loader.load(target + Layout::kQueryBytes, head_pointer<T>(params.dout, next_head), params.dout.row_stride);
    const int thread = thread_index();
    const int row = next_query + thread % kQueries;
    const bool valid = row < length && row >= first_row;
    const int packed_row = query_base + (valid ? row : kSplit ? first_row : 0);
    const uint32_t row_target = target + 2 * Layout::kQueryBytes + thread % kQueries * 4;
    if (thread < kQueries) {
      copy_async_4(row_target, params.lse + next_head * params.lse_stride + packed_row, valid);
      if (params.key_weights != nullptr) {
        copy_async_4(row_target + 2 * kQueries * 4, params.row_slots + packed_row, valid);
      }
    } else if (thread < 2 * kQueries) {
      copy_async_4(row_target + kQueries * 4, params.delta + next_head * params.documents.capacity + packed_row, valid);
    }
    copy_async_commit();
    next_query = query_after(next_query, next_entry);
    if (next_query >= query_end) {
      next_query = first_query;
      next_entry = first_entry;
      ++next_head;
    }
    loader.find_rows(params.documents, query_rows(), next_query);
  };

  {
    KeyLoader key_loader;
    key_loader.find_rows(params.key_documents, key_rows, key_start);
    key_loader.load(base, head_pointer<T>(params.k, key_head), params.k.row_stride);
    key_loader.load(base + Layout::kValues, head_pointer<T>(params.v, key_head), params.v.row_stride);
  }
  loader.find_rows(params.documents, query_rows(), first_query);
  load_next(0);

  // This thread's keys: `key` and key + 8.
  const int key = key_start + warp * 16 + lane / 4;

  float dk[kPartColumns / 8][4], dv[kPartColumns / 8][4];
  clear(dk);
  clear(dv);
  const float scale_log2 = (kOptions ? exponent_scale(params.options, params.scale) : params.scale) * kLog2E;
  const int end_head = (key_head + 1) * params.group;
  int stage = 0;
#pragma unroll 1
  for (int head = key_head * params.group; head < end_head; ++head) {
#pragma unroll 1
    for (int query_start = first_query, entry = first_entry; query_start < query_end;
         query_start = query_after(query_start, entry)) {
      copy_async_wait<0>();
      __syncthreads();  // this stage has arrived; the other one and the scores are no longer in use
      if (next_head < end_head) load_next(stage ^ 1);
      const uint32_t stage_offset = Layout::kStages + stage * Layout::kStage;
      const uint32_t queries = base + stage_offset, douts = queries + Layout::kQueryBytes;
      const float* row_values = reinterpret_cast<const float*>(shared + stage_offset + 2 * Layout::kQueryBytes);
      stage ^= 1;

      float p[kQueries / 8][4], ds[kQueries / 8][4];
      const auto multiply_values = [&] {
        clear(ds);
        multiply_rows<T, kQueries, kHeadDim, kPitch>(ds, value_lane, douts + by_column_bytes);
#pragma unroll
        for (int n = 0; n < kQueries / 8; ++n) {
          const float2 delta = *reinterpret_cast<const float2*>(row_values + kQueries + n * 8 + lane % 4 * 2);
#pragma unroll
          for (int c = 0; c < 4; ++c) ds[n][c] -= c % 2 == 0 ? delta.x : delta.y;
        }
      };
      clear(p);
      multiply_rows<T, kQueries, kHeadDim, kPitch>(p, key_lane, queries + by_column_bytes);
      if constexpr (kOptions) {
        multiply_values();
        soft_cap(p, ds, params.options, params.scale);
        if (kWindow && query_start + kQueries > some_hidden) {
#pragma unroll
          for (int n = 0; n < kQueries / 8; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              const int64_t bound =
                  query_places.nearest(query_start + n * 8 + lane % 4 * 2 + c) - params.options.window;
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                if (key_places.nearest(key + half * 8) <= bound) p[n][half * 2 + c] = -INFINITY;
              }
            }
          }
        }
      }
      if (query_start < key_start + kKeys - 1) {
#pragma unroll
        for (int n = 0; n < kQueries / 8; ++n) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const int query = query_start + n * 8 + lane % 4 * 2 + c % 2;
            if (query < key + c / 2 * 8) p[n][c] = -INFINITY;
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kQueries / 8; ++n) {
        float2 lse = *reinterpret_cast<const float2*>(row_values + n * 8 + lane % 4 * 2);
        if constexpr (kOptions) lse = {closed_lse(lse.x), closed_lse(lse.y)};
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          p[n][c] = exp2_fast(fmaf(p[n][c], scale_log2, -(c % 2 == 0 ? lse.x : lse.y) * kLog2E));
        }
      }
      if (params.key_weights != nullptr) {
        // Read again for every tile: four cached loads in this mode instead of four registers in all modes.
        float weights[2] = {1.0f, 1.0f};
        int slots[2] = {0, 0};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (key + half * 8 >= length) continue;
          slots[half] = params.key_row_slots[key_rows.start + key + half * 8];
          weights[half] = params.key_weights[slots[half]];
        }
#pragma unroll
        for (int n = 0; n < kQueries / 8; ++n) {
          const int2 slot = *reinterpret_cast<const int2*>(row_values + 2 * kQueries + n * 8 + lane % 4 * 2);
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            if ((c % 2 == 0 ? slot.x : slot.y) != slots[c / 2]) p[n][c] *= weights[c / 2];
          }
        }
      }
      if constexpr (!kOptions) multiply_values();
#pragma unroll
      for (int n = 0; n < kQueries / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) ds[n][c] *= p[n][c];
      }
      if (params.dq_float != nullptr) {
        unsigned char* scores =
            shared + Layout::kScores + ((warp * 16 + lane / 4) * Layout::kScorePitch + lane % 4 * 2) * 2;
#pragma unroll
        for (int n = 0; n < kQueries / 8; ++n) {
          *reinterpret_cast<uint32_t*>(scores + n * 16) = pack<T>(ds[n][0], ds[n][1]);
          *reinterpret_cast<uint32_t*>(scores + 8 * Layout::kScorePitch * 2 + n * 16) = pack<T>(ds[n][2], ds[n][3]);
        }
      }
      multiply_fragments<T, kPartColumns, kQueries, kPitch>(dv, p, douts + by_row_bytes + first_column * 2);
      multiply_fragments<T, kPartColumns, kQueries, kPitch>(dk, ds, queries + by_row_bytes + first_column * 2);

      if (params.dq_float != nullptr) {
        __syncthreads();  // every warp's scores are written
        constexpr int kRows = kQueries / Config::kDqRowWarps, kColumns = kPartColumns / Config::kDqColumnWarps;
        static_assert(kRows % 16 == 0 && kColumns % 16 == 0);
        const int row = warp % Config::kDqRowWarps * kRows,
                  column = first_column + warp / Config::kDqRowWarps * kColumns;
        const uint32_t a_lane =
            base + Layout::kScores + (by_column.row * Layout::kScorePitch + by_column.column + row) * 2;
        const uint32_t b_lane = base + by_row_bytes + column * 2;
        float dq[kRows / 16][kColumns / 8][4];
#pragma unroll
        for (int i = 0; i < kRows / 16; ++i) clear(dq[i]);
#pragma unroll
        for (int k = 0; k < kKeys / 16; ++k) {
          uint32_t a[kRows / 16][4];
#pragma unroll
          for (int i = 0; i < kRows / 16; ++i) {
            load_matrices_transposed(a[i], a_lane + (k * 16 * Layout::kScorePitch + i * 16) * 2);
          }
#pragma unroll
          for (int n = 0; n < kColumns / 16; ++n) {
            uint32_t b[4];
            load_matrices_transposed(b, b_lane + (k * 16 * kPitch + n * 16) * 2);
#pragma unroll
            for (int i = 0; i < kRows / 16; ++i) {
              multiply<T>(dq[i][2 * n], a[i], b[0], b[1]);
              multiply<T>(dq[i][2 * n + 1], a[i], b[2], b[3]);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kRows / 16; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int query = query_start + row + i * 16 + half * 8 + lane / 4;
            if (query >= length || query < first_row) continue;
            float* target = params.dq_float +
                            (static_cast<int64_t>(query_base + query) * params.heads + head) * kHeadDim + column +
                            lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < kColumns / 8; ++n) add_pair(target + n * 8, dq[i][n][2 * half], dq[i][n][2 * half + 1]);
          }
        }
      }
    }
  }
  if constexpr (kWindow) copy_async_wait<0>();  // the first copies, if no query sees these keys
  store_rows<T>(params.key_documents, key_rows, from_column<T>(params.dk, first_column), key_head, key, dk,
                params.scale, params.scale);
  store_rows<T>(params.key_documents, key_rows, from_column<T>(params.dv, first_column), key_head, key, dv, 1.0f, 1.0f);
}

}  // namespace lemo::cuda::attention::sm80
