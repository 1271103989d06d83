// The steps of a key tile with tile lists, and the order in which thread blocks take such tiles.
#pragma once

#include "attention/sm90/backward_walk.cuh"

namespace lemo::cuda::attention::sm90 {

// Entries of a list in shared memory, and which of them a walk has yet to visit. Entry `at` belongs to lane at % 32.
// Called by whole warps.
class ListChunk {
 public:
  static constexpr int kSize = 32 * 32;
  struct Storage {
    int32_t tiles[kSize];
  };

  __device__ __forceinline__ explicit ListChunk(Storage& storage) : tiles_(storage.tiles) {}

  // Opens a chunk of `entries` entries, or its size, whose tiles `read` gives.
  template <class Read>
  __device__ __forceinline__ void open(int entries, const Read& read) {
    const int lane = thread_index() % 32, count = min(entries, kSize);
    rounds_ = (count + 31) / 32;
    unvisited_ = 0;
    __syncwarp();
    for (int at = lane; at < count; at += 32) {
      tiles_[at] = read(at);
      unvisited_ |= 1u << at / 32;
    }
    __syncwarp();
  }
  __device__ __forceinline__ int tile_of(int at) const { return tiles_[at]; }
  __device__ __forceinline__ int rounds() const { return rounds_; }
  __device__ __forceinline__ void remove(int at) {
    if (at % 32 == thread_index() % 32) unvisited_ &= ~(1u << at / 32);
  }
  __device__ __forceinline__ bool empty() const { return !__any_sync(0xffffffffu, unvisited_ != 0); }
  // This lane's entry of a round.
  __device__ __forceinline__ bool unvisited(int round) const { return (unvisited_ >> round & 1) != 0; }

 private:
  int32_t* tiles_;
  int rounds_;
  unsigned unvisited_;
};

// As QueryWalk, over a unit's entries. Lists differ, so walks cannot stay together in any fixed order: each goes next
// to the query tile that another thread block of its document and key head has been at most recently, since that one is
// in the L2 cache; or if none has, to the last. In deterministic mode walks go from the end to the front.
template <int kQueries>
struct ListedWalk : HeadWalk {
  static constexpr int kPerTile = kBackwardKeys / kQueries;
  static_assert(kBackwardKeys == LEMO_TILE_ROWS);
  static constexpr unsigned kNever = 0xffffffffu;
  using Storage = ListChunk::Storage;

  const BackwardUnit unit;
  const int32_t* tiles;
  unsigned* visits;  // of the document and key head, by query tile; null in deterministic mode
  int own;
  int last;  // query tile of the document
  int base;  // the first entry of the chunk
  ListChunk chunk;
  // The best of the chunk's rounds looked at so far, of this lane: entry, and time since its tile was visited.
  int looked = 0;
  int best;
  unsigned best_age;

  __device__ __forceinline__ ListedWalk(const BackwardKernelParams& params, const KeyWork& work, int, int first_head,
                                        Storage& storage)
      : unit(work.unit),
        tiles(params.lists.tiles),
        visits(params.turns == nullptr ? params.visits + static_cast<int64_t>(work.key_head) * params.key_slots +
                                             work.key_slot - work.tile.index
                                       : nullptr),
        own(work.tile.index),
        last((work.tile.length - 1) / kQueries),
        chunk(storage) {
    group = params.group;
    rotation = first_head;
    steps = total = count_steps(params, work);
    open_chunk((unit.end - 1 - unit.first) / ListChunk::kSize);
    enter_best();
  }

  static __device__ __forceinline__ int count_steps(const BackwardKernelParams& params, const KeyWork& work) {
    const BackwardUnit& unit = work.unit;
    const int last_tile = tile_at(unit, params.lists.tiles, work.tile.index, unit.end - 1);
    // Only the document's last tile can have fewer query tiles.
    const int of_last = end_of(last_tile, (work.tile.length - 1) / kQueries) % kPerTile + 1;
    return (of_last + (unit.end - unit.first - 1) * kPerTile) * params.group;
  }
  static __device__ __forceinline__ int choose_start(const BackwardKernelParams&, const KeyWork&) { return 0; }

  // Called by a whole warp.
  __device__ __forceinline__ void advance() {
    // All rounds within the steps of a tile, a few at a time: later loads wait for it.
    look(looked + (chunk.rounds() + kPerTile * group - 1) / (kPerTile * group));
    if (advance_head() || steps == 0) return;
    if (query_tile % kPerTile != 0) {
      --query_tile;
      return;
    }
    if (chunk.empty()) {
      const int index = (base - unit.first) / ListChunk::kSize;
      open_chunk(index - 1);
    }
    enter_best();
  }
  __device__ __forceinline__ void publish(const BackwardKernelParams&, const KeyWork&) const {}

  // How many units add to a step's dQ before this one.
  static __device__ __forceinline__ int rank(const BackwardKernelParams& params, const KeyWork& work,
                                             const BackwardStep& step) {
    const int entry = step.entry;
    const int64_t of_head = work.key_head * (params.list_capacity + params.key_slots);
    return params.ranks[of_head + (is_own(work.unit, entry) ? params.list_capacity + work.key_slot : entry)];
  }

 private:
  static __device__ __forceinline__ bool is_own(const BackwardUnit& unit, int at) {
    return unit.part == 0 && at == unit.first;
  }
  static __device__ __forceinline__ int tile_at(const BackwardUnit& unit, const int32_t* tiles, int own, int at) {
    return is_own(unit, at) ? own : tiles[at];
  }
  static __device__ __forceinline__ int end_of(int tile, int last) { return min(tile * kPerTile + kPerTile - 1, last); }
  // In units of 1.024 us; 0 stands for never.
  static __device__ __forceinline__ unsigned now() {
    unsigned long long nanoseconds;
    asm volatile("mov.u64 %0, %%globaltimer;\n" : "=l"(nanoseconds));
    return static_cast<unsigned>(nanoseconds >> 10) | 1u;
  }

  __device__ __forceinline__ void open_chunk(int index) {
    base = unit.first + index * ListChunk::kSize;
    chunk.open(unit.end - base, [&](int at) { return tile_at(unit, tiles, own, base + at); });
    forget();
  }
  __device__ __forceinline__ void forget() {
    looked = 0;
    best = -1;
    best_age = kNever;
  }
  // Looks at the chunk's rounds up to `end`.
  __device__ __forceinline__ void look(int end) {
    const unsigned time = now();
    end = min(end, chunk.rounds());
#pragma unroll 4
    for (; looked < end; ++looked) {
      if (!chunk.unvisited(looked)) continue;
      const int at = looked * 32 + thread_index() % 32;
      const unsigned visit = visits == nullptr ? 0 : __ldcg(visits + chunk.tile_of(at));
      const unsigned age = visit == 0 ? kNever : min(time - visit, kNever - 1);
      if (age <= best_age) {
        best = at;
        best_age = age;
      }
    }
  }
  // Goes to the best entry of all lanes: of those equally recent, the last.
  __device__ __forceinline__ void enter_best() {
    look(ListChunk::kSize / 32);
    const unsigned age = __reduce_min_sync(0xffffffffu, best < 0 ? kNever : best_age);
    const int at = __reduce_max_sync(0xffffffffu, best_age == age ? best : -1);
    entry = base + at;
    const int tile = chunk.tile_of(at);
    query_tile = end_of(tile, last);
    chunk.remove(at);
    if (visits != nullptr && thread_index() % 32 == 0) __stcg(visits + tile, now());
    forget();
  }
};

// A thread block's unit and key head: the heavy units come first, then the others, either section by section of key
// heads. A surplus thread block has a unit that does not exist.
struct UnitOfBlock {
  int unit, key_head;

  __device__ __forceinline__ UnitOfBlock(const BackwardKernelParams& params, const BackwardPlan& plan, int block) {
    const bool heavy = block < plan.heavy * params.key_heads;
    const int first = heavy ? 0 : plan.heavy, units = heavy ? plan.heavy : plan.units - plan.heavy;
    const int at = block - first * params.key_heads, section = max(units, 1) * params.section;
    const int first_head = at / section * params.section;
    unit = first_head < params.key_heads ? first + at % section / params.section : plan.units;
    key_head = first_head + at % section % params.section;
  }
};

template <int kQueries>
__device__ __forceinline__ KeyWork locate_unit(const BackwardKernelParams& params, int block) {
  const BackwardPlan plan = *params.plan;
  const UnitOfBlock which(params, plan, block);
  if (which.unit >= plan.units) {
    KeyWork none{};  // tile.index = tile.count = 0
    return none;
  }
  const BackwardUnit unit = params.units[which.unit];
  KeyWork work = locate_key_tile<kQueries>(params, unit.key_slot, which.key_head);
  work.unit = unit;
  work.unit_index = which.unit;
  return work;
}

// Fills `begins`: hands the thread blocks out to multiprocessors, each to the one that is free first. Called by one
// warp.
__device__ __forceinline__ void estimate_begins(const BackwardKernelParams& params) {
  constexpr int kEach = kPlannedMultiprocessors / 32;
  constexpr unsigned kNever = 0xffffffffu;
  constexpr int kAround = 2;  // steps' worth of time before the first step and after the last
  const BackwardPlan plan = *params.plan;
  const int lane = static_cast<int>(threadIdx.x), blocks = plan.units * params.key_heads;
  unsigned free_at[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) free_at[i] = i * 32 + lane < params.multiprocessors ? 0u : kNever;
  for (int base = 0; base < blocks; base += 32) {
    const UnitOfBlock which(params, plan, base + lane);
    int mine = 0;
    if (base + lane < blocks) {
      const BackwardUnit& unit = params.units[which.unit];
      mine = (unit.end - unit.first) * params.group + kAround;
    }
    unsigned begin = 0;
    for (int i = 0; i < min(32, blocks - base); ++i) {
      const int duration = __shfl_sync(0xffffffffu, mine, i);
      unsigned first = free_at[0];
#pragma unroll
      for (int k = 1; k < kEach; ++k) first = min(first, free_at[k]);
      const unsigned now = __reduce_min_sync(0xffffffffu, first);
      bool taken = lane != __ffs(__ballot_sync(0xffffffffu, first == now)) - 1;
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        if (!taken && free_at[k] == now) {
          free_at[k] = now + duration;
          taken = true;
        }
      }
      if (lane == i) begin = now;
    }
    if (base + lane < blocks) params.begins[which.unit * params.key_heads + which.key_head] = static_cast<int>(begin);
  }
}

}  // namespace lemo::cuda::attention::sm90
