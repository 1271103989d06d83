// The steps of one key tile: the query tiles that see it, each for every query head of the group.
//
// Query tiles are walked downwards and around: from the one that the thread blocks of this key head have reached to the
// diagonal, then from the end of the document; in deterministic mode always from the end. Blocks that read the same
// queries and add to the same dQ thus stay together, and their data stays in the L2 cache; otherwise they would soon
// spread over more than it holds.
#pragma once

#include "attention/aligned_rows.cuh"
#include "attention/sm90/backward_params.h"
#include "common/document_tiles.cuh"
#include "common/mma.cuh"
#include "lemo/attention.h"

namespace lemo::cuda::attention::sm90 {

// A key tile of one key head, and where its document's query tiles are kept. Rows are counted in positions
// (aligned_rows.cuh): keys may lie before 0.
struct KeyWork {
  Tile tile;
  int key_head;
  int key_start;  // the tile's first key
  int key_slot;
  int query_slot;  // slot of the document's first query tile
  int query_row;   // packed row of the query at position 0
  int first_query;
  BackwardUnit unit;  // with tile lists
  int unit_index;

  __device__ __forceinline__ Tile queries() const { return {query_row, tile.length, 0, 0, first_query}; }
  // The first query that may see a key of the tile, rounded down to tiles.
  __device__ __forceinline__ int first_seeing() const { return max(key_start, 0); }
};

// The index of a (query tile, head) in the workspace.
template <class Walk>
__device__ __forceinline__ int item_of(const BackwardKernelParams& params, const KeyWork& work, const Walk& walk) {
  return (work.query_slot + walk.query_tile) * params.heads + work.key_head * params.group + walk.head();
}

// What both walks share: the heads of a query tile, and the count of steps.
struct HeadWalk {
  int query_tile;  // of this step
  int entry = 0;   // with tile lists, of this step: where in the list it stands
  int head_in_group = 0;
  int group;
  int rotation;  // blocks at the same query tile begin with different heads, so that their additions do not collide
  int total;     // steps
  int steps;     // left, this one included

  __device__ __forceinline__ int head() const {
    const int head = head_in_group + rotation;
    return head < group ? head : head - group;
  }
  __device__ __forceinline__ int done() const { return total - steps; }
  // Whether another head of the query tile follows.
  __device__ __forceinline__ bool advance_head() {
    --steps;
    if (++head_in_group < group) return true;
    head_in_group = 0;
    return false;
  }
};

// Where the thread blocks of one document and key head are: the report of the key tile that started last, as
// [key tile, steps done, query tile] from the upper bits down, so that a maximum keeps the newest.
struct Sweep {
  static constexpr unsigned long long kNowhere = 0xffffff;  // no query tile

  unsigned long long* report;
  unsigned long long base;

  __device__ __forceinline__ Sweep(const BackwardKernelParams& params, const KeyWork& work)
      : report(params.sweeps + static_cast<int64_t>(work.query_slot) * params.key_heads + work.key_head),
        base(static_cast<unsigned long long>(work.tile.index) << 48) {}

  template <class Walk>
  __device__ __forceinline__ void publish(const Walk& walk) const {
    const unsigned long long done = walk.done();
    atomicMax(report, base | (done & 0xffffffu) << 24 | static_cast<unsigned>(walk.query_tile));
  }
  // A query tile, or -1.
  __device__ __forceinline__ int position() const {
    const unsigned long long tile = *static_cast<volatile unsigned long long*>(report) & kNowhere;
    return tile == kNowhere ? -1 : static_cast<int>(tile);
  }
};

// The last query tile that a key tile visits: the document's or, with a window, that of the last query to which a key
// is near enough. If there is none, the first that causality allows, so that a tile visits one at least.
template <int kQueries, bool kWindow>
__device__ __forceinline__ int last_query_tile(const BackwardKernelParams& params, const Tile& keys, int key_start) {
  if constexpr (!kWindow) return (keys.length - 1) / kQueries;
  const int last_key = min(key_start + kBackwardKeys, keys.length) - 1;
  return max(params.edges[keys.start + last_key] - 1, max(key_start, 0)) / kQueries;
}

// With a window: the first key tile that visits a query tile. `keys` and `first_key`: of the document.
template <int kQueries>
__device__ __forceinline__ int first_key_tile(const BackwardKernelParams& params, const Tile& keys, int first_key,
                                              int query_tile) {
  int low = 0, high = (keys.length - first_key + kBackwardKeys - 1) / kBackwardKeys;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (last_query_tile<kQueries, true>(params, keys, first_key + middle * kBackwardKeys) < query_tile) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// What the consumers and the adding threads need to know of a step. The producer, which alone walks, writes it with the
// stage of queries.
struct BackwardStep {
  int query_tile;
  int item;   // item_of
  int entry;  // HeadWalk
};

template <int kQueries, bool kWindow>
struct QueryWalk : HeadWalk {
  int first, last;  // query tiles of this key tile

  struct Storage {};  // in shared memory

  // `start` comes from choose_start.
  __device__ __forceinline__ QueryWalk(const BackwardKernelParams& params, const KeyWork& work, int start,
                                       int first_head, Storage&) {
    query_tile = start;
    first = work.first_seeing() / kQueries;
    last = last_tile(params, work);
    group = params.group;
    rotation = first_head;
    steps = total = count_steps(params, work);
  }

  static __device__ __forceinline__ int count_steps(const BackwardKernelParams& params, const KeyWork& work) {
    return (last_tile(params, work) - work.first_seeing() / kQueries + 1) * params.group;
  }

  // Where to begin in order to be near the other thread blocks of this key head: not in deterministic mode, in which
  // they must not matter.
  static __device__ __forceinline__ int choose_start(const BackwardKernelParams& params, const KeyWork& work) {
    const int position = params.turns == nullptr ? Sweep(params, work).position() : -1;
    const int end = last_tile(params, work);
    return position >= work.first_seeing() / kQueries && position <= end ? position : end;
  }
  // Reports where this thread block is. Called by a whole warp.
  __device__ __forceinline__ void publish(const BackwardKernelParams& params, const KeyWork& work) const {
    if (params.turns == nullptr && thread_index() % 32 == 0) Sweep(params, work).publish(*this);
  }

  __device__ __forceinline__ void advance() {
    if (!advance_head()) query_tile = query_tile == first ? last : query_tile - 1;
  }

  // How many key tiles add to a step's dQ before this one.
  static __device__ __forceinline__ int rank(const BackwardKernelParams& params, const KeyWork& work,
                                             const BackwardStep& step) {
    if constexpr (kWindow) return work.tile.index - params.first_tiles[work.query_slot + step.query_tile];
    return work.tile.index;
  }

 private:
  static __device__ __forceinline__ int last_tile(const BackwardKernelParams& params, const KeyWork& work) {
    return last_query_tile<kQueries, kWindow>(params, work.tile, work.key_start);
  }
};

// The work of a key tile and key head.
template <int kQueries>
__device__ __forceinline__ KeyWork locate_key_tile(const BackwardKernelParams& params, int slot, int key_head) {
  KeyWork work;
  const int document = locate_document(params.key_documents, kBackwardKeys, 1, slot);
  const AlignedDocument aligned = align_document<kBackwardKeys>(params.documents, params.key_documents, document);
  const int index = slot - (params.key_documents.cu_seqlens[document] / kBackwardKeys + document);
  work.tile = {aligned.key_start, aligned.length, index,
               (aligned.length + aligned.ahead + kBackwardKeys - 1) / kBackwardKeys, kUncut};
  work.key_head = key_head;
  work.key_start = index * kBackwardKeys - aligned.ahead;
  work.key_slot = slot;
  work.query_slot = params.documents.cu_seqlens[document] / kQueries +
                    document * spare_slots<kBackwardKeys>(params.documents, kQueries);
  work.query_row = aligned.query_start;
  work.first_query = aligned.first;
  return work;
}

// The grid is ordered by section of key heads, then by key tile, the heaviest of a document first, then by key head.
template <int kQueries>
__device__ __forceinline__ KeyWork locate_keys(const BackwardKernelParams& params, int block) {
  const int first_head = block / (params.key_slots * params.section) * params.section;
  const int rest = block - first_head * params.key_slots;
  const int heads = min(params.section, params.key_heads - first_head);
  return locate_key_tile<kQueries>(params, rest / heads, first_head + rest % heads);
}

}  // namespace lemo::cuda::attention::sm90
