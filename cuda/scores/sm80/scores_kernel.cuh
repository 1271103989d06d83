// Exact block scores: a thread block owns a unit of keys and walks the query units of its document that see them (every
// splits-th of them). Scores of all heads are summed in registers; only block maxima leave them.
#pragma once

#include "common/launch.h"
#include "common/sm80/mma_tile.cuh"
#include "scores/params.h"

namespace lemo::cuda::scoring::sm80 {

using namespace cuda::sm80;  // common/sm80

constexpr int kThreads = 128;
constexpr int kWarpQueries = 32;
static_assert(kThreads / 32 * kWarpQueries == kQueryTokens);

template <int kHeadDim>
struct SharedLayout {
  static constexpr int kPitch = kHeadDim + kPadding;
  static constexpr int kQueryBytes = kQueryTokens * kPitch * 2;
  static constexpr int kKeyBytes = kKeyTokens * kPitch * 2;
  static constexpr int kKeys = 2 * kQueryBytes;
  static constexpr int kMaxima = kKeys + 2 * kKeyBytes;
  // The maxima of a pair of units, [query blocks, key blocks], follow.
  static int bytes(int block_size) {
    const int query_blocks = block_size < kQueryTokens ? kQueryTokens / block_size : 1;
    const int key_blocks = block_size < kKeyTokens ? kKeyTokens / block_size : 1;
    return kMaxima + query_blocks * key_blocks * 4;
  }
};

// Rows [first, first + kRows) of a [tokens, heads, head_dim] tensor; rows from `end` on become zeros.
template <typename T, int kRows, int kHeadDim>
__device__ __forceinline__ void load_tokens(uint32_t target, const T* source, int64_t row_stride, int first, int end) {
  constexpr int kChunks = kHeadDim / 8, kLanes = 8;
  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int row = threadIdx.x / kLanes; row < kRows; row += kThreads / kLanes) {
    const bool valid = first + row < end;
    const T* from = source + static_cast<int64_t>(valid ? first + row : first) * row_stride;
#pragma unroll
    for (int chunk = lane; chunk < kChunks; chunk += kLanes) {
      copy_async_16(target + row * (kHeadDim + kPadding) * 2 + chunk * 16, from + chunk * 8, valid);
    }
  }
}

// Position in the walk: a tile of queries against a tile of keys, one head.
struct Cursor {
  int unit;         // query unit of the document
  int query_start;  // tokens
  int query_end;    // end of the unit
  int key_start;
  int head;
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads) scores_kernel(const __grid_constant__ Params params) {
  using Layout = SharedLayout<kHeadDim>;
  constexpr int kPitch = Layout::kPitch;
  constexpr int kRowTiles = kWarpQueries / 16, kKeyTiles = kKeyTokens / 8;
  const int block_size = params.block_size;
  const int key_blocks = block_size < kKeyTokens ? kKeyTokens / block_size : 1;
  const int query_blocks = block_size < kQueryTokens ? kQueryTokens / block_size : 1;

  int document = 0;
  for (int high = params.document_count - 1; document < high;) {
    const int middle = (document + high + 1) / 2;
    if (params.documents[middle] / key_blocks + middle <= static_cast<int>(blockIdx.x)) {
      document = middle;
    } else {
      high = middle - 1;
    }
  }
  const int document_begin = params.documents[document], document_end = params.documents[document + 1];
  const int key_block =
      document_begin + (static_cast<int>(blockIdx.x) - (document_begin / key_blocks + document)) * key_blocks;
  if (key_block >= document_end) return;
  const int key_block_end = min(key_block + key_blocks, document_end);
  const int key_begin = params.offsets[key_block], key_end = params.offsets[key_block_end];
  const int unit_count = (document_end - document_begin + query_blocks - 1) / query_blocks;
  const int first_unit = (key_block - document_begin) / query_blocks + static_cast<int>(blockIdx.y);

  extern __shared__ __align__(16) unsigned char shared[];
  const uint32_t base = shared_address(shared);
  int* maxima = reinterpret_cast<int*>(shared + Layout::kMaxima);
  for (int i = threadIdx.x; i < query_blocks * key_blocks; i += kThreads) maxima[i] = 0;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const LaneOffset by_row = lane_offset_rows_first(lane), by_column = lane_offset_columns_first(lane);
  const uint32_t query_lane = base + ((warp * kWarpQueries + by_row.row) * kPitch + by_row.column) * 2;
  const uint32_t key_lane = base + Layout::kKeys + (by_column.row * kPitch + by_column.column) * 2;

  const auto enter_unit = [&](Cursor& cursor) {
    const int block = document_begin + cursor.unit * query_blocks;
    cursor.query_start = params.offsets[block];
    cursor.query_end = params.offsets[min(block + query_blocks, document_end)];
  };
  // The next step; false after the last one.
  const auto advance = [&](Cursor& cursor) {
    if (++cursor.head < params.heads) return true;
    cursor.head = 0;
    cursor.key_start += kKeyTokens;
    if (cursor.key_start < key_end) return true;
    cursor.key_start = key_begin;
    cursor.query_start += kQueryTokens;
    if (cursor.query_start < cursor.query_end) return true;
    cursor.unit += params.splits;
    if (cursor.unit >= unit_count) return false;
    enter_unit(cursor);
    return true;
  };
  int query_stage = 0, key_stage = 0;  // of the step loaded most recently
  const auto load = [&](const Cursor& cursor) {
    query_stage ^= 1;
    load_tokens<T, kQueryTokens, kHeadDim>(base + query_stage * Layout::kQueryBytes,
                                           head_pointer<T>(params.q, cursor.head), params.q.row_stride,
                                           cursor.query_start, cursor.query_end);
    if (cursor.head % params.group == 0) {
      key_stage ^= 1;
      load_tokens<T, kKeyTokens, kHeadDim>(base + Layout::kKeys + key_stage * Layout::kKeyBytes,
                                           head_pointer<T>(params.k, cursor.head / params.group), params.k.row_stride,
                                           cursor.key_start, key_end);
    }
    copy_async_commit();
  };

  float column_sum = 0.0f;  // of key block key_block + threadIdx.x
  Cursor cursor{first_unit, 0, 0, key_begin, 0};
  bool more = cursor.unit < unit_count;
  if (more) {
    enter_unit(cursor);
    load(cursor);
  }
  float sums[kRowTiles][kKeyTiles][4];
#pragma unroll 1
  while (more) {
    const uint32_t queries = query_lane + query_stage * Layout::kQueryBytes;
    const uint32_t keys = key_lane + key_stage * Layout::kKeyBytes;
    copy_async_wait<0>();
    __syncthreads();  // this step's tiles have arrived; the other stages and the previous unit's maxima are free
    Cursor next = cursor;
    more = advance(next);
    if (more) load(next);

    float s[kRowTiles][kKeyTiles][4];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) clear(s[i]);
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) load_matrices(a[i], queries + (i * 16 * kPitch + k * 16) * 2);
#pragma unroll
      for (int n = 0; n < kKeyTiles / 2; ++n) {
        uint32_t b[4];
        load_matrices(b, keys + (n * 16 * kPitch + k * 16) * 2);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          multiply<T>(s[i][2 * n], a[i], b[0], b[1]);
          multiply<T>(s[i][2 * n + 1], a[i], b[2], b[3]);
        }
      }
    }
    const bool first_head = cursor.head == 0;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float positive = max_nan(s[i][n][c] * params.scale, 0.0f);
          sums[i][n][c] = first_head ? positive : sums[i][n][c] + positive;
        }
      }
    }

    if (cursor.head == params.heads - 1) {
      // Tokens beyond a unit are zeros and cannot raise a maximum; keys after their query are skipped here.
      const float mean = 1.0f / static_cast<float>(params.heads);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = warp * kWarpQueries + i * 16 + half * 8 + lane / 4;
          const int visible = cursor.query_start + row - cursor.key_start - lane % 4 * 2;  // n * 8 + c <= visible
          int* target = maxima + (query_blocks == 1 ? 0 : min(row / block_size, query_blocks - 1)) * key_blocks;
          float row_maximum = 0.0f;
#pragma unroll
          for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              if (n * 8 + c > visible) continue;
              const float value = sums[i][n][2 * half + c] * mean;
              if (key_blocks == 1) {
                row_maximum = max_nan(row_maximum, value);
              } else {
                const int column = min((n * 8 + lane % 4 * 2 + c) / block_size, key_blocks - 1);
                atomicMax(target + column, __float_as_int(value));
              }
            }
          }
          if (key_blocks == 1) {
            row_maximum = max_nan(row_maximum, __shfl_xor_sync(0xffffffffu, row_maximum, 1));
            row_maximum = max_nan(row_maximum, __shfl_xor_sync(0xffffffffu, row_maximum, 2));
            // Values are not negative, so their bits order like integers, with NaN above everything.
            if (lane % 4 == 0) atomicMax(target, __float_as_int(row_maximum));
          }
        }
      }
      if (!more || next.unit != cursor.unit) {
        __syncthreads();
        const int column = threadIdx.x;
        if (column < key_block_end - key_block) {
          const int query_block = document_begin + cursor.unit * query_blocks;
          for (int m = 0; m < query_blocks && query_block + m < document_end; ++m) {
            const float value = __int_as_float(maxima[m * key_blocks + column]);
            maxima[m * key_blocks + column] = 0;
            column_sum += value;
            if (params.map != nullptr) {
              params.map[(query_block + m) * params.map_stride + key_block + column] = value;
            }
          }
        }
      }
    }
    cursor = next;
  }
  if (static_cast<int>(threadIdx.x) < key_block_end - key_block) {
    params.partial[static_cast<int64_t>(blockIdx.y) * params.block_count + key_block + threadIdx.x] = column_sum;
  }
}

template <typename T, int kHeadDim>
void run_scores(const Params& params, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(key_unit_slots(params.block_count, params.document_count, params.block_size)),
                  params.splits);
  launch("scores", scores_kernel<T, kHeadDim>, grid, kThreads, SharedLayout<kHeadDim>::bytes(params.block_size), stream,
         params);
}

}  // namespace lemo::cuda::scoring::sm80
