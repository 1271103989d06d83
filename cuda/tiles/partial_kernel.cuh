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
constexpr int kKeys = kTile / 2;  // keys of a stage of the pipeline
constexpr int kPart = kKeys / 2;  // keys whose scores are in registers: few, so that four thread blocks fit
constexpr int kRun = 8;           // key tiles of a thread block
constexpr int kNoRow = -1;

struct ProbeRows {
  int64_t source[kRows];  // elements from the first of q; kNoRow: the row does not exist
  int64_t target[kRows];  // elements from the first of `partial`, for key tile 0
  int limit[kRows];       // the last packed row that is seen
  int start[kRows];       // first packed row of the document; kNoRow: of none
};

struct KeyTiles {
  int count;
  int start[kRun];  // of the document: its first packed row
  int length[kRun];
  int index[kRun];
};

template <int kHeadDim>
struct SharedLayout {
  static constexpr int kPitch = kHeadDim + kPadding;
  static constexpr int kStage = kKeys * kPitch * 2;  // bytes
  static constexpr int kRowsAt = 2 * kStage;         // the probe rows of q pass through both stages before the keys
  static constexpr int kKeysAt = kRowsAt + static_cast<int>(sizeof(ProbeRows));
  static constexpr int kBytes = kKeysAt + static_cast<int>(sizeof(KeyTiles));
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
  rows.limit[threadIdx.x] = INT32_MAX;
  rows.start[threadIdx.x] = kNoRow;
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

// By one warp: the key tiles of this thread block's run. All runs together begin at the first tile of the document of
// the thread block's first probe row and end at the last probe row's own tile. Slots without a tile are left out, as
// are tiles of documents that end before the first query tile.
__device__ __forceinline__ void find_key_tiles(const ScoreParams& params, KeyTiles& keys) {
  const Documents& documents = params.documents;
  const int64_t per_slot = probe_rows_per_slot(params), first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const int64_t last_row = min(first_row + kRows, params.slots * per_slot) - 1;
  const int first_query = static_cast<int>(params.first_slot + first_row / per_slot);
  const int last_query = static_cast<int>(params.first_slot + last_row / per_slot);
  const int first = first_query - locate_tile(documents, kTile, first_query).index;
  const int lane = threadIdx.x, slot = first + static_cast<int>(blockIdx.y) * kRun + lane;
  const Tile tile = locate_tile(documents, kTile, min(slot, last_query));
  const bool needed =
      lane < kRun && slot <= last_query && tile.index < tile.count && slot - tile.index + tile.count > first_query;
  const unsigned all = __ballot_sync(0xffffffffu, needed);
  if (needed) {
    const int at = __popc(all & ((1u << lane) - 1u));
    keys.start[at] = tile.start;
    keys.length[at] = tile.length;
    keys.index[at] = tile.index;
  }
  if (lane == 0) keys.count = __popc(all);
}

// Of a lane's rows in C layout (tile i, upper or lower half): sums of exp2 over a key tile, relative to 2^base. The
// base follows a row's maximum only when that is more than kSlack above it: a float has room for larger terms than 1.
struct RowSums {
  float base[2][2], sum[2][2];
};
constexpr float kSlack = 8.0f;
constexpr float kNoBase = -1e30f;  // of a row that has seen nothing; finite, so that a difference from it is a number

constexpr int kColumns = kPart / 8;
using Scores = float[2][kColumns][4];

// Keys behind each row's limit become -infinity. `first` is the packed row of the lane's first column.
__device__ __forceinline__ void mask_scores(Scores& s, const int* limits, int first) {
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

// Raises the bases that the scores are far above.
__device__ __forceinline__ void raise_bases(RowSums& rows, const Scores& s, float scale_log2) {
  float top[2][2];
  bool raise = false;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float score = s[i][0][2 * half];
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        if (n > 0) score = fmaxf(score, s[i][n][2 * half]);
        score = fmaxf(score, s[i][n][2 * half + 1]);
      }
      top[i][half] = score * scale_log2;
      raise |= top[i][half] - rows.base[i][half] > kSlack;
    }
  }
  if (!raise) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (top[i][half] - rows.base[i][half] > kSlack) {
        rows.sum[i][half] *= exp2_fast(rows.base[i][half] - top[i][half]);
        rows.base[i][half] = top[i][half];
      }
    }
  }
}

// After raise_bases: no term exceeds 2^kSlack.
__device__ __forceinline__ void add_scores(RowSums& rows, const Scores& s, float scale_log2) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          rows.sum[i][half] += exp2_fast(fmaf(s[i][n][2 * half + c], scale_log2, -rows.base[i][half]));
        }
      }
    }
  }
}

// log2 of the sums over the four lanes that share a row. Lane t of the four gets row t: tile t / 2, half t % 2.
__device__ __forceinline__ float finish_rows(const RowSums& rows) {
  float own_base = 0.0f, own_sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float base = rows.base[i][half];
      base = fmaxf(base, __shfl_xor_sync(0xffffffffu, base, 1));
      base = fmaxf(base, __shfl_xor_sync(0xffffffffu, base, 2));
      float sum = rows.sum[i][half] * exp2_fast(rows.base[i][half] - base);
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (static_cast<int>(thread_index() % 4) == 2 * i + half) own_base = base, own_sum = sum;
    }
  }
  return own_base + log2f(own_sum);
}

// The row whose sum finish_rows gives to this lane.
__device__ __forceinline__ int own_row() {
  const int thread = thread_index();
  return thread / 32 * kWarpRows + thread % 4 / 2 * 16 + thread % 2 * 8 + thread % 32 / 4;
}

// The warp's probe rows from shared memory to registers.
template <int kHeadDim>
__device__ __forceinline__ void read_fragments(uint32_t (&a)[2][kHeadDim / 16][4], uint32_t rows) {
  constexpr int kPitch = kHeadDim + kPadding;
  const LaneOffset lane = lane_offset_rows_first(thread_index() % 32);
  const int first = thread_index() / 32 * kWarpRows + lane.row;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      load_matrices(a[i][k], rows + ((first + i * 16) * kPitch + k * 16 + lane.column) * 2);
    }
  }
}

// The scores of the warp's rows and the kPart keys at `keys`.
template <typename T, int kHeadDim>
__device__ __forceinline__ void multiply_part(Scores& s, const uint32_t (&a)[2][kHeadDim / 16][4], uint32_t keys) {
  constexpr int kPitch = kHeadDim + kPadding;
  const LaneOffset lane = lane_offset_columns_first(thread_index() % 32);
  keys += (lane.row * kPitch + lane.column) * 2;
  clear(s[0]);
  clear(s[1]);
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
#pragma unroll
    for (int n = 0; n < kColumns / 2; ++n) {
      uint32_t b[4];
      load_matrices(b, keys + (n * 16 * kPitch + k * 16) * 2);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        multiply<T>(s[i][2 * n], a[i][k], b[0], b[1]);
        multiply<T>(s[i][2 * n + 1], a[i][k], b[2], b[3]);
      }
    }
  }
}

// Tensor cores wait for exponentials and the other way round, and the assembler does not interleave the two within a
// warp; what hides either is the number of warps, hence the register budget of four thread blocks; of two, if the probe
// rows alone take half of a thread's registers.
template <int kHeadDim>
constexpr int kBlocks = kHeadDim > 128 ? 2 : 4;

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kBlocks<kHeadDim>)
    partial_kernel(const __grid_constant__ ScoreParams params) {
  using Layout = SharedLayout<kHeadDim>;
  using Loader = TileLoader<T, kKeys, kHeadDim, kThreads>;
  constexpr int kDepth = kHeadDim / 16;
  extern __shared__ __align__(16) unsigned char shared[];
  ProbeRows& rows = *reinterpret_cast<ProbeRows*>(shared + Layout::kRowsAt);
  KeyTiles& keys = *reinterpret_cast<KeyTiles*>(shared + Layout::kKeysAt);
  if (threadIdx.x < 32) find_key_tiles(params, keys);
  __syncthreads();
  if (keys.count == 0) return;

  const uint32_t stages = shared_address(shared);
  const int key_head = static_cast<int>(blockIdx.z);
  Loader loader;
  // The rows of half a key tile; they are fetched one stage before the keys.
  const auto find_rows = [&](int n, int half) {
    const Tile tile = {keys.start[n], keys.length[n], 0, 0, kUncut};
    loader.find_rows(params.documents, tile, keys.index[n] * kTile + half * kKeys);
  };
  find_rows(0, 0);
  find_probe_row(params, key_head, rows);
  __syncthreads();
  load_probe_rows<T, kHeadDim>(params.q, rows, stages);
  copy_async_wait<0>();
  __syncthreads();
  uint32_t a[2][kDepth][4];
  read_fragments<kHeadDim>(a, stages);
  __syncthreads();

  const auto load_keys = [&](uint32_t target) {
    loader.load(target, head_pointer<T>(params.k, static_cast<int>(blockIdx.z)), params.k.row_stride);
  };
  load_keys(stages);
  copy_async_commit();
  find_rows(0, 1);
#pragma unroll 1
  for (int key_tile = 0; key_tile < keys.count; ++key_tile) {
    bool any_seen, whole;  // whether a row of the warp sees keys of the tile; whether every row sees all of them
    {
      const int first = keys.start[key_tile] + keys.index[key_tile] * kTile, limit = rows.limit[own_row()];
      any_seen = __any_sync(0xffffffffu, limit >= first && rows.start[own_row()] == keys.start[key_tile]);
      whole = __all_sync(0xffffffffu, limit >= first + kTile - 1);
    }
    RowSums sums = {{{kNoBase, kNoBase}, {kNoBase, kNoBase}}, {}};
#pragma unroll 1  // copies of the body would need more registers
    for (int part = 0; part < kTile / kPart; ++part) {
      if (part * kPart % kKeys == 0) {
        copy_async_wait<0>();
        __syncthreads();  // this half tile has arrived; the other stage is free
        if (part == 0) {
          load_keys(stages + Layout::kStage);
          if (key_tile + 1 < keys.count) find_rows(key_tile + 1, 0);
        } else if (key_tile + 1 < keys.count) {
          load_keys(stages);
          find_rows(key_tile + 1, 1);
        }
        copy_async_commit();
      }
      if (!any_seen) continue;
      Scores s;
      multiply_part<T, kHeadDim>(s, a, stages + part * kPart * Layout::kPitch * 2);
      if (!whole) {
        const int first = keys.start[key_tile] + keys.index[key_tile] * kTile + part * kPart;
        mask_scores(s, rows.limit + thread_index() / 32 * kWarpRows + thread_index() % 32 / 4,
                    first + thread_index() % 4 * 2);
      }
      raise_bases(sums, s, params.scale_log2);
      add_scores(sums, s, params.scale_log2);
    }
    if (!any_seen) continue;
    const float result = finish_rows(sums);
    const int own = own_row(), index = keys.index[key_tile];
    if (rows.start[own] == keys.start[key_tile] && rows.limit[own] >= rows.start[own] + index * kTile) {
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
