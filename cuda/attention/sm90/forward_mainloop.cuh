// Work items, one after the other: what the producer warps load, and what the consumer warpgroups compute.
#pragma once

#include "attention/sm90/forward_work.cuh"
#include "attention/sm90/row_softmax.cuh"
#include "attention/sm90/soft_cap.cuh"
#include "common/sm90/gmma.cuh"
#include "common/sm90/row_loader.cuh"

namespace lemo::cuda::attention::sm90 {

// Where this thread's two rows of a part begin to see keys, with a window.
struct RowWindows {
  int edges[2];
  int last;  // of the warp's rows: keys from there on are seen by all of them

  // Of the part that begins at `row`. settle() is called later, when what was loaded has arrived.
  __device__ __forceinline__ void load(const int32_t* all, const Tile& tile, int row) {
    row += thread_index() % 128 / 32 * 16 + thread_index() % 32 / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) edges[r] = all[tile.start + max(tile.first, min(row + r * 8, tile.length - 1))];
  }
  __device__ __forceinline__ void settle() { last = __shfl_sync(0xffffffffu, edges[1], 31); }

  // Masks a key tile.
  template <class Scores>
  __device__ __forceinline__ void mask(Scores& s, int key_start) const {
    if (key_start >= last) return;
    const int column = key_start + thread_index() % 4 * 2;
    const int hidden[2] = {edges[0] - column, edges[1] - column};
#pragma unroll
    for (int j = 0; j < decltype(cute::size(s))::value; ++j) {
      if (j / 4 * 8 + j % 2 < hidden[j / 2 % 2]) s(j) = -INFINITY;
    }
  }
};

template <typename T, int kHeadDim, Visits kVisits, bool kSoftCap>
struct ForwardMainloop {
  static constexpr bool kListed = kVisits == Visits::kListed, kWindow = kVisits == Visits::kWindow;
  static constexpr ForwardTile kShape = kForwardShape<kHeadDim, kVisits>;
  static constexpr int kQueries = kShape.queries, kKeys = kShape.keys, kStages = kShape.stages;
  static constexpr int kConsumers = kQueries / 64;
  // Whether the next item's first scores start before this item is done, for which its queries have to be there. At
  // head_dim 256 neither shared memory nor registers have room.
  static constexpr bool kChained = kHeadDim <= 128;
  static constexpr int kQueryStages = kChained ? 2 : 1;
  // A warpgroup skips key tiles that others still read, and waits for the one after them.
  static_assert(kStages > (kQueries - 64) / kKeys);
  using Element = GmmaElement<T>;
  using Order = WorkOrder<kHeadDim, kVisits>;
  using Walk = KeyWalk<kListed>;
  using Softmax = RowSoftmax<kWindow>;
  using PartLoader = RowLoader<64, kHeadDim, kQueries, true>;
  using KeyLoader = RowLoader<kKeys, kHeadDim>;
  using QueryLayout = RowLayout<Element, kQueries, kHeadDim, kQueryStages>;
  using KeyLayout = RowLayout<Element, kKeys, kHeadDim, kStages>;
  using ValueLayout = TransposedLayout<Element, kKeys, kHeadDim, kStages>;
  using WarpGroups = cute::Layout<cute::Shape<cute::Int<kConsumers>, cute::_1, cute::_1>>;
  using ScoreMma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float,
                                 cute::Shape<cute::Int<kQueries>, cute::Int<kKeys>, cute::Int<kHeadDim>>>(),
      WarpGroups{}));
  using ValueMma = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float,
                                 cute::Shape<cute::Int<kQueries>, cute::Int<kHeadDim>, cute::Int<kKeys>>,
                                 cute::GMMA::Major::K, cute::GMMA::Major::MN>(),
      WarpGroups{}));

  struct Shared {
    alignas(1024) Element q[kQueryStages * kQueries * kHeadDim];
    alignas(1024) Element k[kStages * kKeys * kHeadDim];
    alignas(1024) Element v[kStages * kKeys * kHeadDim];
    Ring<kQueryStages> queries;
    Ring<kStages> keys, values;
    WorkQueue queue;
  };

  static __device__ __forceinline__ void init(Shared& shared) {
    shared.queries.init(kConsumers * 4);
    shared.keys.init(kConsumers * 4);
    shared.values.init(kConsumers * 4);
    shared.queue.init(kConsumers * 4 + 2);
  }

  // The warp that hands out work items and loads their queries.
  static __device__ __forceinline__ void hand_out(const ForwardKernelParams& params, Shared& shared) {
    auto query = Ring<kQueryStages>::producer_start();
    const auto claim = [&] {
      int item = 0;
      if (thread_index() % 32 == 0) item = static_cast<int>(gridDim.x) + atomicAdd(params.schedule.next, 1);
      return __shfl_sync(0xffffffffu, item, 0);
    };
    uint32_t phase = 1;
    for (int item = static_cast<int>(blockIdx.x);; item = claim()) {
      Work work;
      work.steps = 0;
      for (; item < params.schedule.items; item = claim()) {
        work = Order::decode(params, item);
        if (work.steps > 0) break;
      }
      shared.queue.put(work, phase);
      phase ^= 1;
      if (work.steps == 0) break;
      const PartLoader loader(params.documents, work.tile);
      typename PartLoader::Pending pending[kConsumers];
#pragma unroll
      for (int c = 0; c < kConsumers; ++c) {
        const int row = Order::part(params, work, c).row;
        pending[c] = loader.fetch(row >= 0 ? row : work.tile.length);
      }
      uint64_t* barrier = shared.queries.acquire(query, kConsumers * PartLoader::kBytes);
#pragma unroll
      for (int c = 0; c < kConsumers; ++c) {
        loader.load(loader.resolve(pending[c]), params.q, Order::part(params, work, c).head, barrier,
                    shared.q + query.index() * (kQueries * kHeadDim) + c * 64 * PartLoader::kColumns);
      }
      ++query;
      shared.queue.wanted.wait(phase);
    }
  }

  // One warp each: they wait for different stages.
  static __device__ __forceinline__ void load_keys(const ForwardKernelParams& params, Shared& shared) {
    load_tiles<true>(params, shared.queue, params.k, shared.keys, shared.k);
  }
  static __device__ __forceinline__ void load_values(const ForwardKernelParams& params, Shared& shared) {
    load_tiles<false>(params, shared.queue, params.v, shared.values, shared.v);
  }

  // A consumer warpgroup. `store(work, part, softmax, out)` receives the sums over keys, not yet divided by the
  // softmax's sums.
  template <class Store>
  static __device__ __forceinline__ void compute(const ForwardKernelParams& params, Shared& shared, int consumer,
                                                 const Store& store) {
    using namespace cute;
    ScoreMma score_mma;
    ValueMma value_mma;
    const Tensor q = make_tensor(make_smem_ptr(shared.q), QueryLayout{});
    const Tensor k = make_tensor(make_smem_ptr(shared.k), KeyLayout{});
    const Tensor v = make_tensor(make_smem_ptr(shared.v), ValueLayout{});
    const auto score_slice = score_mma.get_slice(consumer * 128);
    const auto value_slice = value_mma.get_slice(consumer * 128);
    const Tensor q_fragments = score_slice.partition_fragment_A(q);
    const Tensor k_fragments = score_slice.partition_fragment_B(k);
    const Tensor v_fragments = value_slice.partition_fragment_B(v);
    const float scale_log2 = params.scale_log2;
    [[maybe_unused]] const float tanh_factor = params.tanh_factor;

    using Scores = decltype(partition_fragment_C(score_mma, Shape<Int<kQueries>, Int<kKeys>>{}));
    auto out = partition_fragment_C(value_mma, Shape<Int<kQueries>, Int<kHeadDim>>{});
    // P as the left operand of its product: the accumulator's layout is the operand's.
    auto p = make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<kKeys / 16>>>{});
    const auto round = [&](auto const& s) {
      auto packed = recast<uint32_t>(p);
#pragma unroll
      for (int j = 0; j < size(s); j += 2) packed(j / 2) = pack<T>(s(j), s(j + 1));
    };
    // Masks the first tile that a part sees; it sees the others whole, unless there is a window.
    const auto mask = [&](auto& s, int row) {
      const int visible = row % kKeys + thread_index() % 128 / 32 * 16 + thread_index() % 32 / 4 -
                          thread_index() % 4 * 2;  // of the upper row
#pragma unroll
      for (int j = 0; j < size(s); ++j) {
        if (j / 4 * 8 + j % 2 > visible + j / 2 % 2 * 8) s(j) = -INFINITY;
      }
    };

    cutlass::PipelineState<kQueryStages> query;
    cutlass::PipelineState<kStages> key, value;
    uint32_t phase = 0;
    Softmax softmax;
    [[maybe_unused]] RowWindows windows;  // of the part whose keys are visited
    Work work;
    Part part;
    bool running = false;  // P of `work`'s last step waits for its product
    const auto skip_keys = [&](int steps) {
      for (int i = 0; i < steps; ++i) {
        shared.keys.wait(key);
        shared.keys.release(key);
        ++key;
      }
    };
    // Skipped steps take their turns too: every warpgroup has to take as many.
    const auto skip_values = [&](int steps) {
      for (int i = 0; i < steps; ++i) {
        shared.values.wait(value);
        shared.values.release(value);
        ++value;
        Turns<kConsumers>::take(consumer);
        Turns<kConsumers>::pass(consumer);
      }
    };
    const auto finish_values = [&] {
      warpgroup_wait<0>();
      warpgroup_fence_operand(out);
      shared.values.release(value);
      ++value;
    };
    Turns<kConsumers>::start(consumer);
    while (true) {
      const Work next = shared.queue.take(phase);
      const Part next_part = Order::part(params, next, consumer);
      const bool has_part = next.steps > 0 && (!Order::kMissing || next_part.row >= 0);
      if (running && (!kChained || !has_part)) {
        shared.values.wait(value);
        issue<false>(value_mma, p, v_fragments(_, _, _, value.index()), out);
        finish_values();
        store(work, part, softmax, out);
        running = false;
      }
      if (next.steps == 0) break;
      shared.queries.wait(query);
      if (!has_part) {
        shared.queries.release(query);
        ++query;
        for (int step = 0; step < next.steps; ++step) {
          skip_keys(1);
          skip_values(1);
        }
        continue;
      }
      // The tile that is visited first may lie beyond the part's rows.
      const int skipped = max(0, next.last_keys - next_part.row / kKeys);
      skip_keys(skipped);
      {
        Scores s;
        Softmax next_softmax;
        if constexpr (kWindow) windows.load(params.edges, next.tile, next_part.row);
        const auto begin_softmax = [&] {
          warpgroup_fence_operand(s);
          shared.keys.release(key);
          ++key;
          if constexpr (kSoftCap) soft_cap<0, size(Scores{})>(s, tanh_factor);
          mask(s, next_part.row);
          if constexpr (kWindow) {
            windows.settle();
            windows.mask(s, (next.last_keys - skipped) * kKeys);
          }
          next_softmax.update(s, scale_log2);
        };
        shared.keys.wait(key);
        Turns<kConsumers>::take(consumer);
        issue<true>(score_mma, q_fragments(_, _, _, query.index()), k_fragments(_, _, _, key.index()), s);
        if (kChained && running) {
          // The last product of the previous item runs behind this item's first scores and softmax.
          shared.values.wait(value);
          issue<false>(value_mma, p, v_fragments(_, _, _, value.index()), out);
          Turns<kConsumers>::pass(consumer);
          warpgroup_wait<1>();
          begin_softmax();
          finish_values();
          round(s);
          store(work, part, softmax, out);
        } else {
          Turns<kConsumers>::pass(consumer);
          warpgroup_wait<0>();
          begin_softmax();
          round(s);
        }
        softmax = next_softmax;
      }
      skip_values(skipped);
      clear(out);
      work = next;
      part = next_part;
      running = true;
      // A step: this tile's scores and the previous tile's values run together, then this tile's softmax behind the
      // values.
#pragma unroll 1
      for (int step = 1 + skipped; step < work.steps; ++step) {
        Scores s;
        shared.keys.wait(key);
        Turns<kConsumers>::take(consumer);
        issue<true>(score_mma, q_fragments(_, _, _, query.index()), k_fragments(_, _, _, key.index()), s);
        shared.values.wait(value);
        issue<false>(value_mma, p, v_fragments(_, _, _, value.index()), out);
        Turns<kConsumers>::pass(consumer);
        warpgroup_wait<1>();
        warpgroup_fence_operand(s);
        shared.keys.release(key);
        ++key;
        if constexpr (kSoftCap) soft_cap<0, size(Scores{})>(s, tanh_factor);
        if constexpr (kWindow) windows.mask(s, (work.last_keys - step) * kKeys);
        softmax.update(s, scale_log2);
        finish_values();
        round(s);
        softmax.rescale(out);
      }
      shared.queries.release(query);
      ++query;
    }
  }

 private:
  // Loads the tiles of `tensor` for all work items. Called by one warp.
  template <bool kAsks>
  static __device__ __forceinline__ void load_tiles(const ForwardKernelParams& params, WorkQueue& queue,
                                                    const RowTensor& tensor, Ring<kStages>& ring, Element* target) {
    // The next item is requested this many steps before the end of the current one: as late as decoding it allows, so
    // that the thread blocks end together.
    constexpr int kAhead = 3;
    auto state = Ring<kStages>::producer_start();
    uint32_t phase = 0;
    while (true) {
      const Work work = queue.take(phase);
      if (work.steps == 0) break;
      const Tile keys = {work.key_start, work.tile.length, 0, 0, kUncut};
      const KeyLoader loader(params.key_documents, keys);
      const Walk walk(params.lists, work);
      // The row map is read one step ahead: under load its latency is close to the length of a step.
      auto next = loader.fetch(walk[0] * kKeys);
#pragma unroll 1
      for (int step = 0; step < work.steps; ++step) {
        if (kAsks && step == max(0, work.steps - kAhead)) queue.ask();
        const auto runs = loader.resolve(next);
        if (step + 1 < work.steps) next = loader.fetch(walk[step + 1] * kKeys);
        uint64_t* barrier = ring.acquire(state, KeyLoader::kBytes);
        loader.load(runs, tensor, work.key_head, barrier, target + state.index() * (kKeys * kHeadDim));
        ++state;
      }
    }
  }
};

}  // namespace lemo::cuda::attention::sm90
