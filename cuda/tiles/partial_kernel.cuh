// The products of tile_scores. A thread block owns kRows probe rows of one key head and a run of key tiles; the rows
// may belong to several query tiles and documents. Per key tile and row, log2 of the sum of exp2 over the keys that the
// row sees is all that leaves registers.
#pragma once

#include <algorithm>

#include "common/launch.h"
#include "common/sm80/mma_tile.cuh"
#include "tiles/params.h"

namespace lemo::cuda::tiling {

using namespace cuda::sm80;  // common/sm80

constexpr int kThreads = 128;
constexpr int kRows = kThreads;  // probe rows of a thread block; each thread looks up one of them
constexpr int kWarpRows = 32;
constexpr int kKeys = kTile / 2;  // keys of a step: half a key tile
constexpr int kRun = 8;           // key tiles of a thread block
constexpr int kNoRow = -1;

struct ProbeRows {
  int64_t source[kRows];  // elements from the first of q; kNoRow: the row does not exist
  int64_t target[kRows];  // elements from the first of `partial`, for key tile 0
  int limit[kRows];       // the last packed row that is seen; kNoRow: none
  int start[kRows];       // first packed row of the document
};

template <int kHeadDim>
struct SharedLayout {
  static constexpr int kPitch = kHeadDim + kPadding;
  static constexpr int kStage = kKeys * kPitch * 2;  // bytes
  static constexpr int kRowsAt = 2 * kStage;         // the probe rows of q pass through both stages before the keys
  static constexpr int kBytes = kRowsAt + static_cast<int>(sizeof(ProbeRows));
  static_assert(kRows * kPitch * 2 == 2 * kStage);
};

__device__ __forceinline__ int64_t probe_rows_per_slot(const ScoreParams& params) {
  return static_cast<int64_t>(params.probes) * params.group;
}

// Where the thread's probe row is read, what it sees, and where its sums go.
__device__ __forceinline__ void find_probe_row(const ScoreParams& params, int key_head, ProbeRows& rows) {
  const int64_t per_slot = probe_rows_per_slot(params);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x;
  const int64_t strip_slot = row / per_slot;
  rows.source[threadIdx.x] = rows.target[threadIdx.x] = kNoRow;
  rows.limit[threadIdx.x] = rows.start[threadIdx.x] = kNoRow;
  if (strip_slot >= params.slots) return;
  const Tile tile = locate_tile(params.documents, kTile, static_cast<int>(params.first_slot + strip_slot));
  if (tile.index >= tile.count) return;
  const int in_slot = static_cast<int>(row - strip_slot * per_slot);
  const int probe = in_slot / params.group, head = key_head * params.group + in_slot % params.group;
  const int size = min(kTile, tile.length - tile.index * kTile);
  const int packed = tile.start + tile.index * kTile + (2 * probe + 1) * size / (2 * params.probes);
  rows.source[threadIdx.x] = storage_row(params.documents, packed) * params.q.row_stride + head * params.q.head_stride;
  rows.target[threadIdx.x] =
      strip_slot * params.key_tiles * params.heads * params.probes + key_head * per_slot + in_slot;
  rows.limit[threadIdx.x] = packed;
  rows.start[threadIdx.x] = tile.start;
}

template <typename T, int kHeadDim>
__device__ __forceinline__ void load_probe_rows(const TensorView& q, const ProbeRows& rows, uint32_t target) {
  constexpr int kChunks = kHeadDim / 8, kLanes = 8;
  const T* source = static_cast<const T*>(q.data);
  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int row = threadIdx.x / kLanes; row < kRows; row += kThreads / kLanes) {
    const int64_t offset = rows.source[row];
    const bool valid = offset != kNoRow;
#pragma unroll
    for (int chunk = lane; chunk < kChunks; chunk += kLanes) {
      copy_async_16(target + row * (kHeadDim + kPadding) * 2 + chunk * 16, source + (valid ? offset : 0) + chunk * 8,
                    valid);
    }
  }
  copy_async_commit();
}

// Walks the slots of key tiles, from the first tile of the document of the thread block's first probe row to the last
// probe row's own tile.
class KeyTiles {
 public:
  // The run of this thread block.
  __device__ __forceinline__ explicit KeyTiles(const ScoreParams& params) {
    const Documents& documents = params.documents;
    const int64_t per_slot = probe_rows_per_slot(params), first_row = static_cast<int64_t>(blockIdx.x) * kRows;
    const int64_t last_row = min(first_row + kRows, params.slots * per_slot) - 1;
    first_query_ = static_cast<int>(params.first_slot + first_row / per_slot);
    const int last_query = static_cast<int>(params.first_slot + last_row / per_slot);
    const int first = base(documents, locate_document(documents, kTile, 1, first_query_));
    slot_ = first + static_cast<int>(blockIdx.y) * kRun;
    end_ = min(slot_ + kRun, last_query + 1);
    if (slot_ >= end_) return;
    enter(documents, locate_document(documents, kTile, 1, slot_));
    settle(documents);
  }

  __device__ __forceinline__ bool valid() const { return slot_ < end_; }
  __device__ __forceinline__ Tile tile() const { return {start_, length_, index(), ceil_div(length_, kTile), kUncut}; }
  __device__ __forceinline__ int index() const { return slot_ - base_; }
  __device__ __forceinline__ int start() const { return start_; }
  __device__ __forceinline__ void advance(const Documents& documents) {
    ++slot_;
    settle(documents);
  }

 private:
  static __device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }
  static __device__ __forceinline__ int base(const Documents& documents, int document) {
    return documents.cu_seqlens[document] / kTile + document;
  }
  __device__ __forceinline__ void enter(const Documents& documents, int document) {
    document_ = document;
    start_ = documents.cu_seqlens[document];
    length_ = documents.cu_seqlens[document + 1] - start_;
    base_ = start_ / kTile + document;
  }
  // Skips slots without a tile, and tiles of documents that end before the first query tile.
  __device__ __forceinline__ void settle(const Documents& documents) {
    for (; slot_ < end_; ++slot_) {
      while (document_ + 1 < documents.count && base(documents, document_ + 1) <= slot_) {
        enter(documents, document_ + 1);
      }
      const int count = ceil_div(length_, kTile);
      if (index() < count && base_ + count > first_query_) return;
    }
  }

  int slot_, end_, first_query_;
  int document_, start_, length_, base_;
};

// Rows of a lane in C layout: tile i, upper or lower half. Sums of a key tile's exp2, relative to 2^(scale * top).
struct RowSums {
  float top[2][2], sum[2][2];
};

// The exponent that a row's sum is relative to. A row that sees nothing has the sum 0.
__device__ __forceinline__ float exponent_of(float top, float scale_log2) {
  return top == -INFINITY ? 0.0f : top * scale_log2;
}
__device__ __forceinline__ float rescale(float sum, float top_before, float top, float scale_log2) {
  return top_before == top ? sum : sum * exp2_fast((top_before - top) * scale_log2);
}

template <int kColumns>
__device__ __forceinline__ void add_scores(RowSums& rows, const float (&s)[2][kColumns][4], float scale_log2) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = rows.top[i][half];
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        top = max_nan(top, max_nan(s[i][n][2 * half], s[i][n][2 * half + 1]));
      }
      const float exponent = exponent_of(top, scale_log2);
      float sum = rescale(rows.sum[i][half], rows.top[i][half], top, scale_log2);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        sum += exp2_fast(fmaf(s[i][n][2 * half], scale_log2, -exponent));
        sum += exp2_fast(fmaf(s[i][n][2 * half + 1], scale_log2, -exponent));
      }
      rows.top[i][half] = top;
      rows.sum[i][half] = sum;
    }
  }
}

// log2 of the sums over the four lanes that share a row. Lane t of the four gets row t: tile t / 2, half t % 2.
__device__ __forceinline__ float finish_rows(const RowSums& rows, float scale_log2) {
  float result = 0.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = rows.top[i][half];
      top = max_nan(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = max_nan(top, __shfl_xor_sync(0xffffffffu, top, 2));
      const float exponent = exponent_of(top, scale_log2);
      float sum = rescale(rows.sum[i][half], rows.top[i][half], top, scale_log2);
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (static_cast<int>(threadIdx.x % 4) == 2 * i + half) result = exponent + log2f(sum);
    }
  }
  return result;
}

// Keys behind each row's limit become -infinity. `first` is the packed row of the lane's first column.
template <int kColumns>
__device__ __forceinline__ void mask_scores(float (&s)[2][kColumns][4], const int* limits, int first) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int visible = limits[i * 16 + half * 8] - first;
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          if (n * 8 + c > visible) s[i][n][2 * half + c] = -INFINITY;
        }
      }
    }
  }
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 3) partial_kernel(const __grid_constant__ ScoreParams params) {
  using Layout = SharedLayout<kHeadDim>;
  using Loader = TileLoader<T, kKeys, kHeadDim, kThreads>;
  constexpr int kPitch = Layout::kPitch, kDepth = kHeadDim / 16, kColumns = kKeys / 8;
  KeyTiles keys(params);
  if (!keys.valid()) return;

  extern __shared__ __align__(16) unsigned char shared[];
  ProbeRows& rows = *reinterpret_cast<ProbeRows*>(shared + Layout::kRowsAt);
  const uint32_t stages = shared_address(shared);
  const int key_head = static_cast<int>(blockIdx.z), lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * kWarpRows;
  find_probe_row(params, key_head, rows);
  __syncthreads();
  load_probe_rows<T, kHeadDim>(params.q, rows, stages);
  copy_async_wait<0>();
  __syncthreads();
  uint32_t a[2][kDepth][4];
  const LaneOffset by_row = lane_offset_rows_first(lane), by_column = lane_offset_columns_first(lane);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      load_matrices(a[i][k], stages + ((first_row + i * 16 + by_row.row) * kPitch + k * 16 + by_row.column) * 2);
    }
  }
  __syncthreads();

  const T* source = head_pointer<T>(params.k, key_head);
  const uint32_t key_lane = stages + (by_column.row * kPitch + by_column.column) * 2;
  // The lane's row of the results (finish_rows).
  const int own = first_row + lane % 4 / 2 * 16 + lane % 2 * 8 + lane / 4;
  const int own_limit = rows.limit[own], own_start = rows.start[own];
  const int least_limit = __reduce_min_sync(0xffffffffu, own_limit == kNoRow ? INT32_MAX : own_limit);

  Loader loader;
  loader.find_rows(params.documents, keys.tile(), keys.index() * kTile);
  loader.load(stages, source, params.k.row_stride);
  copy_async_commit();
  loader.find_rows(params.documents, keys.tile(), keys.index() * kTile + kKeys);
#pragma unroll 1
  while (keys.valid()) {
    const int start = keys.start(), index = keys.index(), first = start + index * kTile;
    const bool seen = own_limit >= first && own_start == start;
    const bool any_seen = __any_sync(0xffffffffu, seen), whole = least_limit >= first + kTile - 1;
    RowSums sums;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) sums.top[i][half] = -INFINITY, sums.sum[i][half] = 0.0f;
    }
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      copy_async_wait<0>();
      __syncthreads();  // this step's keys have arrived; the other stage is free
      if (step == 0) {
        loader.load(stages + Layout::kStage, source, params.k.row_stride);
        keys.advance(params.documents);
        if (keys.valid()) loader.find_rows(params.documents, keys.tile(), keys.index() * kTile);
      } else if (keys.valid()) {
        loader.load(stages, source, params.k.row_stride);
        loader.find_rows(params.documents, keys.tile(), keys.index() * kTile + kKeys);
      }
      copy_async_commit();
      if (!any_seen) continue;

      float s[2][kColumns][4];
      clear(s[0]);
      clear(s[1]);
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
#pragma unroll
        for (int n = 0; n < kColumns / 2; ++n) {
          uint32_t b[4];
          load_matrices(b, key_lane + step * Layout::kStage + (n * 16 * kPitch + k * 16) * 2);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            multiply<T>(s[i][2 * n], a[i][k], b[0], b[1]);
            multiply<T>(s[i][2 * n + 1], a[i][k], b[2], b[3]);
          }
        }
      }
      if (!whole) mask_scores(s, rows.limit + first_row + lane / 4, first + step * kKeys + lane % 4 * 2);
      add_scores(sums, s, params.scale_log2);
    }
    if (!any_seen) continue;
    const float result = finish_rows(sums, params.scale_log2);
    if (seen) {
      params.partial[rows.target[own] + static_cast<int64_t>(index) * params.heads * params.probes] = result;
    }
  }
}

template <typename T, int kHeadDim>
void run_partial(const ScoreParams& params, cudaStream_t stream) {
  const int64_t per_slot = static_cast<int64_t>(params.probes) * params.group;
  // The slots between the first key tile of a document and a thread block's last query tile.
  const int64_t reach = params.key_tiles + ceil_div(kRows, per_slot) + 2;
  const dim3 grid(static_cast<unsigned>(ceil_div(params.slots * per_slot, kRows)),
                  static_cast<unsigned>(ceil_div(reach, kRun)), static_cast<unsigned>(params.heads / params.group));
  launch("tile_scores", partial_kernel<T, kHeadDim>, grid, kThreads, SharedLayout<kHeadDim>::kBytes, stream, params);
}

}  // namespace lemo::cuda::tiling
