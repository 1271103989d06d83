// The steps of one key tile: the query tiles that see it, each for every query head of the group.
//
// Query tiles are walked downwards and around: from the one that the thread blocks of this key head are at, to the
// diagonal, then from the end of the document. Blocks that read the same queries, and add to the same dQ, thereby stay
// together, and their data in the L2 cache; each on its own they would soon be spread over more than it holds.
#pragma once

#include "backward_params.h"
#include "cuda/attention/tile.cuh"
#include "lemo/attention.h"

namespace lemo::cuda::attention::hopper {

// A key tile of one key head, and where its document's query tiles are kept.
struct KeyWork {
  Tile tile;
  int key_head;
  int key_start;  // first key, within the document
  int key_slot;
  int query_slot;  // slot of the document's first query tile
};

template <int kQueries>
struct QueryWalk {
  int query_tile;  // of this step
  int head_in_group = 0;
  int first, last;  // query tiles of this key tile
  int group;
  int rotation;  // thread blocks at the same query tile begin with different heads, so that their additions do not meet
  int steps;     // left, this one included

  __device__ __forceinline__ QueryWalk(const BackwardKernelParams& params, const KeyWork& work, int start,
                                       int first_head)
      : query_tile(start),
        first(work.key_start / kQueries),
        last((work.tile.length - 1) / kQueries),
        group(params.group),
        rotation(first_head),
        steps((last - first + 1) * group) {}

  __device__ __forceinline__ int head() const {
    const int head = head_in_group + rotation;
    return head < group ? head : head - group;
  }
  __device__ __forceinline__ void advance() {
    --steps;
    if (++head_in_group == group) {
      head_in_group = 0;
      query_tile = query_tile == first ? last : query_tile - 1;
    }
  }
};

// The same with tile lists: the listed tiles of queries from the last down, then the key tile's own.
template <int kQueries>
struct ListedWalk {
  static constexpr int kPerTile = kBackwardKeys / kQueries;
  static_assert(kBackwardKeys == LEMO_TILE_ROWS);

  int query_tile;
  int head_in_group = 0;
  int group;
  int rotation;
  int steps;
  int last;                           // query tile of the document
  int own;                            // the key tile itself
  int upcoming;                       // tile of the list after this one, fetched while this one is worked on
  const int32_t *next_entry, *begin;  // of the list; next_entry is behind `upcoming`, towards the front

  __device__ __forceinline__ ListedWalk(const BackwardKernelParams& params, const KeyWork& work, int, int first_head)
      : group(params.group), rotation(first_head), last((work.tile.length - 1) / kQueries), own(work.tile.index) {
    begin = params.lists.blocks + params.lists.offsets[work.key_slot];
    next_entry = params.lists.blocks + params.lists.offsets[work.key_slot + 1];
    const int listed = static_cast<int>(next_entry - begin);
    upcoming = fetch();
    // Only the document's last tile can have fewer query tiles: the first one visited.
    query_tile = end_of(upcoming);
    steps = (query_tile % kPerTile + 1 + listed * kPerTile) * group;
    upcoming = query_tile / kPerTile == own ? own : fetch();
  }

  __device__ __forceinline__ int head() const {
    const int head = head_in_group + rotation;
    return head < group ? head : head - group;
  }
  __device__ __forceinline__ void advance() {
    --steps;
    if (++head_in_group < group) return;
    head_in_group = 0;
    if (query_tile % kPerTile != 0) {
      --query_tile;
    } else {
      query_tile = end_of(upcoming);
      upcoming = fetch();
    }
  }

 private:
  __device__ __forceinline__ int fetch() { return next_entry > begin ? *--next_entry : own; }
  __device__ __forceinline__ int end_of(int tile) const { return min(tile * kPerTile + kPerTile - 1, last); }
};

// Where the thread blocks of one document and key head are: the report of the key tile that started last, as
// [key tile, query tiles done, query tile] from the upper bits down, so that a maximum keeps the newest.
struct Sweep {
  static constexpr unsigned long long kNowhere = 0xffffff;  // no query tile

  unsigned long long* report;
  unsigned long long base;

  __device__ __forceinline__ Sweep(unsigned long long* where, int key_tile)
      : report(where), base(static_cast<unsigned long long>(key_tile) << 48) {}

  template <class Walk>
  __device__ __forceinline__ void publish(const Walk& walk) const {
    const unsigned long long done = (walk.last - walk.first + 1) * walk.group - walk.steps;
    atomicMax(report, base | (done & 0xffffffu) << 24 | static_cast<unsigned>(walk.query_tile));
  }
  __device__ __forceinline__ int position() const {
    return static_cast<int>(*static_cast<volatile unsigned long long*>(report) & kNowhere);
  }
};

// The grid is ordered by section of key heads, then by key tile, the heaviest of a document first, then by key head.
template <int kQueries>
__device__ __forceinline__ KeyWork locate_keys(const BackwardKernelParams& params, int block) {
  const int first_head = block / (params.key_slots * params.section) * params.section;
  const int rest = block - first_head * params.key_slots;
  const int heads = min(params.section, params.key_heads - first_head);
  const int slot = rest / heads;
  KeyWork work;
  work.tile = locate_tile(params.documents, kBackwardKeys, slot);
  work.key_head = first_head + rest - slot * heads;
  work.key_start = work.tile.index * kBackwardKeys;
  work.key_slot = slot;
  const int document = slot - work.tile.index - work.tile.start / kBackwardKeys;
  work.query_slot = work.tile.start / kQueries + document;
  return work;
}

}  // namespace lemo::cuda::attention::hopper
