// Parameters of the sm_90a backward kernels, and the layout of their workspace.
//
// Everything per query is kept in tiles of kQueries rows, counted from the start of each document (document_tiles.cuh:
// locate_tile numbers them): whole tiles need neither aligned documents nor bounds checks, and one tile of one head is
// contiguous for bulk copies.
#pragma once

#include "attention/aligned_rows.cuh"
#include "attention/params.h"
#include "attention/sm90/backward_config.h"
#include "attention/sm90/visits.h"
#include "common/sm90/row_tensor.h"

namespace lemo::cuda::attention::sm90 {

using namespace cuda::sm90;  // common/sm90

// With tile lists, what a thread block works on: a key tile or, if its list is very long, one of several parts.
struct BackwardUnit {
  int key_slot;
  // Entries of lists.tiles. The one before a tile's list, offsets[key_slot] - 1, stands for the tile itself.
  int first, end;
  int part, parts;
  int partials;  // with several parts: where the tile's partial gradients and counts begin
};

// The order in which thread blocks take the units (backward_plan.cu).
struct BackwardPlan {
  int units;
  int heavy;  // units that go first; either lot goes section by section of key heads
};

// Multiprocessors that a plan reckons with. It sets how many parts there may be.
constexpr int kPlannedMultiprocessors = 160;

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
  unsigned long long* sweeps;  // without lists: [slots, key_heads], of which a document uses its first slot
  int key_slots;               // key tiles of all documents, an upper bound (document_tiles.cuh: locate_tile)
  int section;                 // key heads per section of the grid
  int* turns;                  // [slots, heads]; null: dQ is added in any order (backward_adder.cuh)

  // With tile lists.
  int64_t list_capacity;  // entries that lists.tiles has room for
  int multiprocessors;    // at most kPlannedMultiprocessors
  unsigned* visits;       // [key_heads, key_slots]: when each query tile was last visited
  BackwardPlan* plan;
  BackwardUnit* units;  // [max_units]
  int max_units;
  float* partials;  // [part_units, key_heads, 2, kBackwardKeys * kHeadDim]: dK and dV, as threads hold them
  int* arrived;     // [part_units, key_heads], of which a tile uses its first: parts whose gradients are there
  // Deterministic mode: the step at which a unit is expected to begin, [max_units, key_heads]; the first unit of each
  // key tile, [key_slots]; and how many units add to a query tile before an entry's, and before the tile itself,
  // [key_heads, list_capacity + key_slots].
  int* begins;
  int* first_units;
  int* ranks;

  // With a window.
  int32_t* edges;     // of keys (window_edges.h)
  int* first_tiles;   // [slots]: the first key tile that visits each query tile. Deterministic mode, else null
  float tanh_factor;  // with a soft-cap, as in the forward pass
};

// The order of one tile's dQ: [warp, 8 columns, lane, 4], which is how accumulators leave registers. A warp's part is
// contiguous, and so is every 16-byte store of a warp.
//
// kQueries = 128: warpgroup w owns rows 64 w ... of all columns. kQueries = 64: it owns columns 64 w ... of all rows,
// or 128 w ... at head_dim 256.
template <int kHeadDim>
struct DqOrder {
  static constexpr int kQueries = kBackwardTile<kHeadDim>.queries;
  static constexpr bool kByRows = kQueries == 128;
  static constexpr int kSize = kQueries * kHeadDim;
  static constexpr int kChunkFloats = 16 * 8;  // of a warp: 16 rows, 8 columns

  static constexpr __host__ __device__ int chunks(int warpgroup) {
    if (kHeadDim > 128) return kHeadDim / 2 / 8;
    return kByRows || warpgroup == 0 ? 64 / 8 : (kHeadDim - 64) / 8;
  }
  // Where a warp's part begins.
  static constexpr __host__ __device__ int offset(int warpgroup, int warp) {
    return (warpgroup * 4 * chunks(0) + warp * chunks(warpgroup)) * kChunkFloats;
  }
};

// Fill the plan and, from `begins` (backward_stats_kernel), the ranks (backward_plan.cu).
void launch_backward_plan(const BackwardKernelParams& params, cudaStream_t stream);
void launch_backward_ranks(const BackwardKernelParams& params, cudaStream_t stream);

// At most so many units are parts. It is enough for parts as long as a multiprocessor's share of all work: of the tiles
// of all key heads, fewer than kPlannedMultiprocessors are then cut off, and fewer than twice as many are parts.
__host__ __device__ constexpr int64_t part_units(int64_t key_heads) { return 2 * kPlannedMultiprocessors / key_heads; }

struct BackwardLayout {
  int64_t slots;
  int64_t key_slots, max_units, part_units;  // with lists; else 0
  // Offsets; the sums come first.
  int64_t stats, sweeps, turns, edges, first_tiles, visits, plan, units, arrived, begins, first_units, ranks, partials,
      bytes;
};

template <int kHeadDim>
inline BackwardLayout backward_layout(const BackwardSizes& sizes) {
  constexpr int64_t kQueries = DqOrder<kHeadDim>::kQueries;
  const Documents& documents = sizes.documents;
  BackwardLayout layout{};
  layout.slots = query_slots<kBackwardKeys>(documents, static_cast<int>(kQueries));
  if (sizes.listed) {
    layout.key_slots = tile_slots(documents, kBackwardKeys);  // lists go with keys that are the queries' rows
    layout.part_units = part_units(sizes.key_heads);
    layout.max_units = layout.key_slots + layout.part_units;
  }
  int64_t bytes = 0;
  const auto take = [&](int64_t size) {
    const int64_t offset = bytes;
    bytes += (size + 127) / 128 * 128;
    return offset;
  };
  const int64_t tiles = layout.slots * sizes.heads;
  const int64_t entries = sizes.listed ? sizes.list_capacity + layout.key_slots : 0;
  take(tiles * DqOrder<kHeadDim>::kSize * 4);
  layout.stats = take(tiles * kQueries * 2 * 4);
  layout.sweeps = take(layout.slots * sizes.key_heads * 8);
  layout.turns = take(sizes.deterministic ? tiles * 4 : 0);
  layout.edges = take(sizes.window ? sizes.key_capacity * 4 : 0);
  layout.first_tiles = take(sizes.window && sizes.deterministic ? layout.slots * 4 : 0);
  layout.visits = take(layout.key_slots * sizes.key_heads * 4);
  layout.plan = take(static_cast<int64_t>(sizeof(BackwardPlan)));
  layout.units = take(layout.max_units * static_cast<int64_t>(sizeof(BackwardUnit)));
  layout.arrived = take(layout.part_units * sizes.key_heads * 4);
  layout.begins = take(sizes.deterministic ? layout.max_units * sizes.key_heads * 4 : 0);
  layout.first_units = take(sizes.deterministic ? layout.key_slots * 4 : 0);
  layout.ranks = take(sizes.deterministic ? entries * sizes.key_heads * 4 : 0);
  layout.partials = take(layout.part_units * sizes.key_heads * 2 * kBackwardKeys * kHeadDim * 4);
  layout.bytes = bytes;
  return layout;
}

}  // namespace lemo::cuda::attention::sm90
