// The work items of the forward kernel, and how they reach all warps of a thread block.
#pragma once

#include "attention/aligned_rows.cuh"
#include "attention/sm90/forward_config.h"
#include "attention/sm90/forward_params.h"
#include "common/document_tiles.cuh"
#include "common/mma.cuh"
#include "common/sm90/pipeline.cuh"

namespace lemo::cuda::attention::sm90 {

// The 64 queries of one consumer warpgroup.
struct Part {
  int head;
  int row;  // the first one, within the document
};

// Parts that see the same key tiles: of one query tile and key head, kConsumers at a time.
struct Work {
  Tile tile;      // the document's queries, in positions (aligned_rows.cuh), as everything here
  int key_start;  // packed row of the key at position 0
  int last_keys;  // the key tile that is visited first
  int list;       // with tile lists: where in lists.tiles the others start
  int steps;      // key tiles; 0: no work is left
  int key_head;
  int first_row;   // of the query tile
  int first_part;  // among the query tile's parts in all heads of the group
};

template <int kHeadDim, Visits kVisits>
struct WorkOrder {
  static constexpr bool kListed = kVisits == Visits::kListed;
  static constexpr ForwardTile kShape = kForwardShape<kHeadDim, kVisits>;
  static constexpr int kConsumers = kShape.queries / 64;
  // A list describes LEMO_TILE_ROWS queries, however many a thread block has room for: it takes parts of several heads.
  static constexpr int kParts = kListed ? LEMO_TILE_ROWS / 64 : kConsumers;  // of a query tile and head
  static constexpr int kRows = kParts * 64;                                  // of a query tile
  // Whether a warpgroup without rows skips its work. Two keep pace with each other anyway.
  static constexpr bool kMissing = kConsumers > 2;

  // Work items of a query tile and key head.
  static constexpr __host__ __device__ int items(int group) { return (group * kParts + kConsumers - 1) / kConsumers; }

  // steps is 0 in the slots that rounding leaves empty.
  static __device__ __forceinline__ Work decode(const ForwardKernelParams& params, int item) {
    const ForwardSchedule& schedule = params.schedule;
    const int columns = items(params.group), section_items = schedule.slots * schedule.section * columns;
    const int first_head = item / section_items * schedule.section;
    const int heads = min(schedule.section, params.heads / params.group - first_head);
    const int rest = item % section_items;
    const int slot = rest / (heads * columns), column = rest % (heads * columns);
    Work work;
    const QueryTile located = locate_queries<kAlignedRows>(params.documents, params.key_documents, kRows, slot);
    work.tile = located.tile;
    work.key_start = located.document.key_start;
    const int query_tile = work.tile.count - 1 - work.tile.index;
    // If parts can be missing and there are no lists, the last tile ends with the document: parts are then missing from
    // the first tile, which has the least work.
    work.first_row =
        kListed || !kMissing ? query_tile * kRows : (work.tile.length + 63) / 64 * 64 - (work.tile.index + 1) * kRows;
    work.key_head = first_head + column / columns;
    work.first_part = column % columns * kConsumers;
    work.steps = 0;
    if (work.tile.index < work.tile.count) {
      if constexpr (kListed) {
        const int32_t* offsets = params.lists.offsets + slot - work.tile.index + query_tile;
        work.last_keys = query_tile;
        work.list = offsets[0];
        work.steps = 1 + offsets[1] - offsets[0];
      } else {
        const int end = min(work.first_row + kRows, work.tile.length);
        work.last_keys = (end + kShape.keys - 1) / kShape.keys - 1;
        const int ahead = located.document.ahead;
        work.steps = work.last_keys + 1 + ahead / kShape.keys;
        if constexpr (kVisits == Visits::kWindow) {
          // From the diagonal down to the first key that the first query sees. It may see none, not even there; but
          // every part visits the tile of its own rows.
          const int diagonal = kShape.keys < kRows ? work.last_keys + 1 - work.first_row / kShape.keys : 1;
          const int first_key = params.edges[work.tile.start + max(work.first_row, work.tile.first)];
          work.steps = max(diagonal, work.steps - (first_key + ahead) / kShape.keys);
        }
      }
    }
    return work;
  }

  // The part of a consumer warpgroup; row < 0 if it has none.
  static __device__ __forceinline__ Part part(const ForwardKernelParams& params, const Work& work, int consumer) {
    const int index = work.first_part + consumer, head = index / kParts;
    const int row = work.first_row + index % kParts * 64;
    const bool missing = kMissing && (row < 0 || row >= work.tile.length || head >= params.group);
    return {work.key_head * params.group + head, missing ? -1 : row};
  }
};

// The key tiles of a work item in the order of visits, the diagonal first. A part's own 64 rows lie within one key
// tile, the first that it sees: only that one needs a mask, unless a window hides keys of others.
template <bool kListed>
struct KeyWalk {
  int last;
  const int32_t* list;

  __device__ __forceinline__ KeyWalk(const TileLists& lists, const Work& work) : last(work.last_keys) {
    list = kListed ? lists.tiles + work.list - 1 : nullptr;
  }
  __device__ __forceinline__ int operator[](int step) const {
    if constexpr (kListed) return step == 0 ? last : list[step];
    return last - step;
  }
};

// Passes work items, one at a time, from the warp that hands them out to all others.
struct WorkQueue {
  EmptyBarrier wanted, full, empty;
  Work work;

  __device__ __forceinline__ void init(int readers) {
    wanted.init(1);
    full.init(1);
    init_for_warps(empty, readers);
  }
  // Requests the next item. Called by one reader.
  __device__ __forceinline__ void ask() {
    if (thread_index() % 32 == 0) wanted.arrive();
  }
  // Called by the whole warp that hands out. `phase` is 1 at first.
  __device__ __forceinline__ void put(const Work& next, uint32_t phase) {
    empty.wait(phase);
    if (thread_index() % 32 == 0) {
      work = next;
      full.arrive();
    }
  }
  // Called by a whole warp. `phase` is 0 at first.
  __device__ __forceinline__ Work take(uint32_t& phase) {
    full.wait(phase);
    phase ^= 1;
    const Work taken = work;
    __syncwarp();
    arrive_as_warp(empty);
    return taken;
  }
};

}  // namespace lemo::cuda::attention::sm90
