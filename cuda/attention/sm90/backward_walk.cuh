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

template <int kQueries>
struct QueryWalk : HeadWalk {
  int first, last;  // query tiles of this key tile

  // `start` comes from choose_start.
  __device__ __forceinline__ QueryWalk(const BackwardKernelParams& params, const KeyWork& work, int start,
                                       int first_head) {
    query_tile = start;
    first = work.first_seeing() / kQueries;
    last = (work.tile.length - 1) / kQueries;
    group = params.group;
    rotation = first_head;
    steps = total = (last - first + 1) * group;
  }

  // Where to begin in order to be near query tile `position` (-1: at the end). Called by one warp.
  static __device__ __forceinline__ int choose_start(const BackwardKernelParams&, const KeyWork& work, int position) {
    const int end = (work.tile.length - 1) / kQueries;
    return position >= work.first_seeing() / kQueries && position <= end ? position : end;
  }

  // `position()`: the query tile that the thread blocks of this key head are at, or -1.
  template <class Position>
  __device__ __forceinline__ void advance(const Position&) {
    if (!advance_head()) query_tile = query_tile == first ? last : query_tile - 1;
  }

  // How many key tiles add to a step's dQ before this one.
  static __device__ __forceinline__ int rank(const BackwardKernelParams&, const KeyWork& work, int) {
    return work.tile.index;
  }
};

// The entries of a list that a walk has yet to visit, one chunk at a time, in the registers of a warp.
class Unvisited {
 public:
  static constexpr int kChunk = 32 * 32;

  // Opens a chunk of `entries` entries. The other functions are called by whole warps.
  __device__ __forceinline__ void open(int entries) {
    const int mine = min(entries, kChunk) - thread_index() % 32 * 32;
    word_ = mine >= 32 ? 0xffffffffu : mine > 0 ? (1u << mine) - 1 : 0u;
  }
  __device__ __forceinline__ void remove(int at) {
    if (at / 32 == thread_index() % 32) word_ &= ~(1u << at % 32);
  }
  __device__ __forceinline__ bool empty() const { return !__any_sync(0xffffffffu, word_ != 0); }
  // The last unvisited entry up to `at`, or -1.
  __device__ __forceinline__ int last_up_to(int at) const {
    const int lane = thread_index() % 32;
    const unsigned mine = lane < at / 32 ? word_ : lane == at / 32 ? word_ & ((2u << at % 32) - 1) : 0u;
    const unsigned words = __ballot_sync(0xffffffffu, mine != 0);
    if (words == 0) return -1;
    const int word = 31 - __clz(words);
    return word * 32 + 31 - __clz(__shfl_sync(0xffffffffu, mine, word));
  }

 private:
  unsigned word_;  // entries 32 lane ... 32 lane + 31
};

// The same with tile lists: the circle is the key tile's own tile, then its list from the end to the front. Thread
// blocks advance at the different speeds of their lists; one that falls behind the others skips what it has missed,
// until it comes round again.
template <int kQueries>
struct ListedWalk : HeadWalk {
  static constexpr int kPerTile = kBackwardKeys / kQueries;
  static_assert(kBackwardKeys == LEMO_TILE_ROWS);
  static constexpr int kLag = 1;  // a block this many tiles behind still counts as level with the others

  const int32_t* tiles;
  int begin, end;  // of the list
  int own;
  int last;  // query tile of the document
  int base;  // the first entry of the chunk
  Unvisited unvisited;

  __device__ __forceinline__ ListedWalk(const BackwardKernelParams& params, const KeyWork& work, int start,
                                        int first_head)
      : tiles(params.lists.tiles),
        begin(params.lists.offsets[work.key_slot]),
        end(params.lists.offsets[work.key_slot + 1]),
        own(work.tile.index),
        last((work.tile.length - 1) / kQueries) {
    group = params.group;
    rotation = first_head;
    entry = start;  // begin - 1 stands for the key tile itself
    query_tile = end_of(tile_of(entry));
    // Only the document's last tile can have fewer query tiles.
    steps = total = (end_of(tile_of(end - 1)) % kPerTile + 1 + (end - begin) * kPerTile) * group;
    open_chunk((entry - begin + 1) / Unvisited::kChunk);
  }

  static __device__ __forceinline__ int choose_start(const BackwardKernelParams& params, const KeyWork& work,
                                                     int position) {
    const int begin = params.lists.offsets[work.key_slot], end = params.lists.offsets[work.key_slot + 1];
    const int near = position < 0 ? -1 : position / kPerTile;
    int before = 0;  // entries up to `near`
    for (int at = begin + thread_index() % 32; __any_sync(0xffffffffu, at < end); at += 32) {
      before += __popc(__ballot_sync(0xffffffffu, at < end && params.lists.tiles[at] <= near));
    }
    return before > 0 || near == work.tile.index ? begin + before - 1 : end - 1;
  }

  // Called by a whole warp.
  template <class Position>
  __device__ __forceinline__ void advance(const Position& position) {
    if (advance_head() || steps == 0) return;
    if (query_tile % kPerTile != 0) {
      --query_tile;
      return;
    }
    unvisited.remove(entry - base);
    int before = entry - base;
    if (unvisited.empty()) {
      const int chunk = (base - begin + 1) / Unvisited::kChunk;
      open_chunk(chunk > 0 ? chunk - 1 : (end - begin) / Unvisited::kChunk);
      before = Unvisited::kChunk - 1;
    }
    int next = unvisited.last_up_to(before);
    if (next < 0) next = unvisited.last_up_to(Unvisited::kChunk - 1);
    // Lanes may have read different positions.
    const int others = __shfl_sync(0xffffffffu, position(), 0);
    if (others >= 0 && tile_of(base + next) > others / kPerTile + kLag) {
      const int near = unvisited.last_up_to(entries_up_to(others / kPerTile) - 1);
      if (near >= 0) next = near;
    }
    entry = base + next;
    query_tile = end_of(tile_of(entry));
  }

  static __device__ __forceinline__ int rank(const BackwardKernelParams& params, const KeyWork& work, int entry) {
    return params.ranks[entry < params.lists.offsets[work.key_slot] ? params.list_capacity + work.key_slot : entry];
  }

 private:
  __device__ __forceinline__ int tile_of(int at) const { return at < begin ? own : tiles[at]; }
  __device__ __forceinline__ int end_of(int tile) const { return min(tile * kPerTile + kPerTile - 1, last); }
  __device__ __forceinline__ void open_chunk(int chunk) {
    base = begin - 1 + chunk * Unvisited::kChunk;
    unvisited.open(end - base);
  }
  // How many entries of the chunk are tiles up to `tile`, in two steps.
  __device__ __forceinline__ int entries_up_to(int tile) const {
    const int lane = thread_index() % 32;
    const auto is_up_to = [&](int at) {
      return at < Unvisited::kChunk && base + at < end && tile_of(base + at) <= tile;
    };
    const int words = __popc(__ballot_sync(0xffffffffu, is_up_to(lane * 32)));
    if (words == 0) return 0;
    return (words - 1) * 32 + __popc(__ballot_sync(0xffffffffu, is_up_to((words - 1) * 32 + lane)));
  }
};

// Where the thread blocks of one document and key head are: the report of the key tile that started last, as
// [key tile, steps done, query tile] from the upper bits down, so that a maximum keeps the newest.
struct Sweep {
  static constexpr unsigned long long kNowhere = 0xffffff;  // no query tile

  unsigned long long* report;
  unsigned long long base;

  __device__ __forceinline__ Sweep(unsigned long long* where, int key_tile)
      : report(where), base(static_cast<unsigned long long>(key_tile) << 48) {}

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

// The grid is ordered by section of key heads, then by key tile, the heaviest of a document first, then by key head.
template <int kQueries>
__device__ __forceinline__ KeyWork locate_keys(const BackwardKernelParams& params, int block) {
  const int first_head = block / (params.key_slots * params.section) * params.section;
  const int rest = block - first_head * params.key_slots;
  const int heads = min(params.section, params.key_heads - first_head);
  const int slot = rest / heads;
  KeyWork work;
  const int document = locate_document(params.key_documents, kBackwardKeys, 1, slot);
  const AlignedDocument aligned = align_document<kBackwardKeys>(params.documents, params.key_documents, document);
  const int index = slot - (params.key_documents.cu_seqlens[document] / kBackwardKeys + document);
  work.tile = {aligned.key_start, aligned.length, index,
               (aligned.length + aligned.ahead + kBackwardKeys - 1) / kBackwardKeys, kUncut};
  work.key_head = first_head + rest - slot * heads;
  work.key_start = index * kBackwardKeys - aligned.ahead;
  work.key_slot = slot;
  work.query_slot = params.documents.cu_seqlens[document] / kQueries +
                    document * spare_slots<kBackwardKeys>(params.documents, kQueries);
  work.query_row = aligned.query_start;
  work.first_query = aligned.first;
  return work;
}

}  // namespace lemo::cuda::attention::sm90
