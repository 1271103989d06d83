// With tile lists, the plan of the backward pass: which thread block works on what, and in deterministic mode the turns
// in which units add to a query tile.
//
// A key tile that all queries list, as the first of a document usually is, may have more work than a multiprocessor's
// share of the whole: it is cut into parts. What takes more than twice as long as its section of key heads leaves to
// each multiprocessor goes first: begun with the last section, it would end long after it.
//
// Turns follow the time at which each unit is expected to arrive, if every step takes as long as any other and thread
// blocks start as soon as a multiprocessor is free. Then hardly any waits for another, however different the lists; in
// the order of key tiles, the slowest stretch of any list would delay all later ones. Nothing can lock up: of all
// additions still to come, consider the earliest by plan. All of the unit's earlier ones are done, and if it has not
// started, then of the units before it fewer are unfinished than the plan has multiprocessors, so that one is free. The
// plan may therefore count on no more multiprocessors than the kernel gets.
#include <cub/block/block_scan.cuh>

#include "attention/sm90/backward_lists.cuh"
#include "common/launch.h"

namespace lemo::cuda::attention::sm90 {
namespace {

constexpr int kPlanThreads = 1024;
constexpr int kShortestPart = 16;  // entries

__device__ __forceinline__ int weight_of(const BackwardKernelParams& params, int slot) {
  const Tile tile = locate_tile(params.documents, kBackwardKeys, slot);
  if (tile.index >= tile.count) return 0;
  return params.lists.offsets[slot + 1] - params.lists.offsets[slot] + 1;
}

__global__ void __launch_bounds__(kPlanThreads)
    backward_plan_kernel(const __grid_constant__ BackwardKernelParams params) {
  using Scan = cub::BlockScan<int, kPlanThreads>;
  __shared__ typename Scan::TempStorage storage;
  const int slots = params.key_slots, thread = static_cast<int>(threadIdx.x);
  const int64_t all = params.lists.offsets[slots] - params.lists.offsets[0] + slots;
  const int64_t share = (all * params.key_heads + params.multiprocessors - 1) / params.multiprocessors;
  const int longest = max(static_cast<int>(share), kShortestPart);
  const int64_t most = 2 * all * params.section;
  const auto parts_of = [&](int weight) { return (weight + longest - 1) / longest; };
  const auto is_heavy = [&](int weight) {
    return weight > longest || static_cast<int64_t>(weight) * params.multiprocessors > most;
  };

  const int each = (slots + kPlanThreads - 1) / kPlanThreads, begin = thread * each, end = min(begin + each, slots);
  int heavy = 0, light = 0, part_count = 0;
  for (int slot = begin; slot < end; ++slot) {
    const int weight = weight_of(params, slot), parts = parts_of(weight);
    (is_heavy(weight) ? heavy : light) += parts;
    if (parts > 1) part_count += parts;
  }
  int heavy_units, light_units, parts_before;
  Scan(storage).ExclusiveSum(heavy, heavy, heavy_units);
  __syncthreads();
  Scan(storage).ExclusiveSum(light, light, light_units);
  __syncthreads();
  Scan(storage).ExclusiveSum(part_count, parts_before);
  light += heavy_units;
  for (int slot = begin; slot < end; ++slot) {
    const int weight = weight_of(params, slot), parts = parts_of(weight);
    // (By value: a reference to either of two counters would put both into local memory.)
    const int unit = is_heavy(weight) ? heavy : light;
    (is_heavy(weight) ? heavy : light) += parts;
    if (params.turns != nullptr) params.first_units[slot] = unit;
    const int first = params.lists.offsets[slot] - 1;
    for (int part = 0; part < parts; ++part) {
      const auto cut = [&](int at) { return first + static_cast<int>(static_cast<int64_t>(weight) * at / parts); };
      params.units[unit + part] = {slot, cut(part), cut(part + 1), part, parts, parts_before};
    }
    if (parts > 1) parts_before += parts;
  }
  if (thread == 0) *params.plan = {heavy_units + light_units, heavy_units};
  const int counts = static_cast<int>(part_units(params.key_heads)) * params.key_heads;
  for (int i = thread; i < counts; i += kPlanThreads) params.arrived[i] = 0;
  for (int i = thread; i < slots * params.key_heads; i += kPlanThreads) params.visits[i] = 0;
}

constexpr int kRankThreads = 128;

// Up to kMost entries that list one query tile, in any order.
struct Listing {
  static constexpr int kMost = 1024;
  int count;
  int unit[kMost];
  int wait[kMost];       // steps from the unit's begin
  int64_t place[kMost];  // in `ranks`, of one key head

  // Collects from the key tile `from` on; returns the first that it did not look at. Called by the whole block.
  __device__ int collect(const BackwardKernelParams& params, const Tile& tile, int slot, int from) {
    const int32_t* offsets = params.lists.offsets + slot - tile.index;  // of the document
    const int32_t* query_tiles = params.lists.tiles;
    __syncthreads();
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    while (from <= tile.index && count + kRankThreads <= kMost) {
      __syncthreads();  // everyone has read `count`
      const int key_tile = from + static_cast<int>(threadIdx.x);
      if (key_tile <= tile.index) {
        const int list = offsets[key_tile], list_end = offsets[key_tile + 1];
        int entry = list - 1;  // the query tile's own
        if (key_tile < tile.index) {
          ++entry;
          for (int end = list_end; entry < end;) {
            const int middle = (entry + end) / 2;
            if (query_tiles[middle] < tile.index) {
              entry = middle + 1;
            } else {
              end = middle;
            }
          }
        }
        if (entry < list || (entry < list_end && query_tiles[entry] == tile.index)) {
          const int key_slot = slot - tile.index + key_tile;
          int at = params.first_units[key_slot];
          while (entry >= params.units[at].end) ++at;
          const int i = atomicAdd(&count, 1);
          unit[i] = at;
          wait[i] = (params.units[at].end - 1 - entry) * params.group;
          place[i] = entry < list ? params.list_capacity + key_slot : entry;
        }
      }
      from += kRankThreads;
      __syncthreads();
    }
    return from;
  }
};

// One thread block per query tile.
__global__ void __launch_bounds__(kRankThreads)
    backward_ranks_kernel(const __grid_constant__ BackwardKernelParams params) {
  __shared__ Listing some, others;
  __shared__ unsigned long long times[Listing::kMost];
  const int slot = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const Tile tile = locate_tile(params.documents, kBackwardKeys, slot);
  if (tile.index >= tile.count) return;
  const int64_t stride = params.list_capacity + params.key_slots;
  for (int from = 0; from <= tile.index;) {
    const int next = some.collect(params, tile, slot, from);
    for (int other = 0; other <= tile.index;) {
      const bool same = from == 0 && next > tile.index;
      const int next_other = same ? next : others.collect(params, tile, slot, other);
      const Listing& before = same ? some : others;
      for (int key_head = 0; key_head < params.key_heads; ++key_head) {
        // Who would arrive at the same time goes in the order of units.
        const auto time_of = [&](const Listing& listing, int i) {
          const unsigned begin = params.begins[listing.unit[i] * params.key_heads + key_head];
          return static_cast<unsigned long long>(begin + listing.wait[i]) << 32 |
                 static_cast<unsigned>(listing.unit[i]);
        };
        __syncthreads();
        for (int i = thread; i < before.count; i += kRankThreads) times[i] = time_of(before, i);
        __syncthreads();
        for (int i = thread; i < some.count; i += kRankThreads) {
          const unsigned long long mine = time_of(some, i);
          int& rank = params.ranks[key_head * stride + some.place[i]];
          int earlier = other == 0 ? 0 : rank;
          for (int k = 0; k < before.count; ++k) earlier += times[k] < mine ? 1 : 0;
          rank = earlier;
        }
      }
      other = next_other;
    }
    from = next;
  }
}

}  // namespace

void launch_backward_plan(const BackwardKernelParams& params, cudaStream_t stream) {
  launch("attention_backward", backward_plan_kernel, 1, kPlanThreads, 0, stream, params);
}

void launch_backward_ranks(const BackwardKernelParams& params, cudaStream_t stream) {
  launch("attention_backward", backward_ranks_kernel, static_cast<unsigned>(params.key_slots), kRankThreads, 0, stream,
         params);
}

}  // namespace lemo::cuda::attention::sm90
