// Parameters of the sm_90a backward kernels, and the layout of their workspace.
//
// Everything per query is kept in tiles of kQueries rows, counted from the start of each document (document_tiles.cuh:
// locate_tile numbers them): whole tiles need neither aligned documents nor bounds checks, and one tile of one head is
// contiguous for bulk copies.
#pragma once

#include "attention/aligned_rows.cuh"
#include "attention/params.h"
#include "attention/sm90/backward_config.h"
#include "common/sm90/row_tensor.h"

namespace lemo::cuda::attention::sm90 {

using namespace cuda::sm90;  // common/sm90

struct BackwardKernelParams {
  RowTensor q, k, v, dout;
  TensorView out_view, dout_view, dq, dk, dv;
  const float* lse;
  int64_t lse_stride;
  Documents documents;  // of queries
  Documents key_documents;
  TileLists lists;  // query tiles of each key tile
  const float* key_weights;
  const int32_t* row_slots;  // of queries
  const int32_t* key_row_slots;
  int heads;
  int key_heads;
  int group;
  int head_dim;
  float scale;
  float scale_log2;

  float* dq_sums;              // [slots, heads, kQueries * kHeadDim] in the order of DqOrder
  float* stats;                // [slots, heads, 2, kQueries]: lse in base 2 (+infinity beyond the document), delta
  unsigned long long* sweeps;  // [slots, key_heads], of which a document uses its first slot
  int key_slots;               // key tiles of all documents, an upper bound (document_tiles.cuh: locate_tile)
  int section;                 // key heads per section of the grid
  // Deterministic mode (backward_adder.cuh); null: dQ is added in any order.
  int* turns;  // [slots, heads]
  // With lists, [list_capacity + key_slots]: how many key tiles add before each entry's, and before the tile itself.
  int* ranks;
  int64_t list_capacity;  // entries that lists.tiles has room for
};

// The order of one tile's dQ: [warp, 8 columns, lane, 4], which is how accumulators leave registers. A warp's part is
// contiguous, and so is every 16-byte store of a warp.
//
// kQueries = 128: warpgroup w owns rows 64 w ... of all columns. kQueries = 64: it owns columns 64 w ... of all rows.
template <int kHeadDim>
struct DqOrder {
  static constexpr int kQueries = kBackwardTile<kHeadDim>.queries;
  static constexpr bool kByRows = kQueries == 128;
  static constexpr int kSize = kQueries * kHeadDim;
  static constexpr int kChunkFloats = 16 * 8;  // of a warp: 16 rows, 8 columns

  static constexpr __host__ __device__ int chunks(int warpgroup) {
    return kByRows || warpgroup == 0 ? 64 / 8 : (kHeadDim - 64) / 8;
  }
  // Where a warp's part begins.
  static constexpr __host__ __device__ int offset(int warpgroup, int warp) {
    return (warpgroup * 4 * chunks(0) + warp * chunks(warpgroup)) * kChunkFloats;
  }
};

// Fills `ranks` from the lists (backward_ranks.cu).
void launch_backward_ranks(const BackwardKernelParams& params, cudaStream_t stream);

struct BackwardLayout {
  int64_t slots;
  int64_t stats, sweeps, turns, ranks, bytes;  // offsets; the sums come first
};

template <int kHeadDim>
inline BackwardLayout backward_layout(const Documents& documents, int64_t heads, bool ordered, int64_t list_capacity) {
  constexpr int64_t kQueries = DqOrder<kHeadDim>::kQueries;
  BackwardLayout layout{};
  layout.slots = query_slots<kBackwardKeys>(documents, static_cast<int>(kQueries));
  const int64_t tiles = layout.slots * heads;
  layout.stats = tiles * DqOrder<kHeadDim>::kSize * 4;
  layout.sweeps = layout.stats + tiles * kQueries * 2 * 4;
  layout.turns = layout.sweeps + tiles * 8;  // at most as many key heads as heads
  layout.ranks = layout.turns + (ordered ? tiles * 4 : 0);
  // Lists go with keys that are the queries' rows.
  layout.bytes = layout.ranks + (ordered ? (list_capacity + tile_slots(documents, kBackwardKeys)) * 4 : 0);
  return layout;
}

}  // namespace lemo::cuda::attention::sm90
