// One query tile against its key tiles: what the producer warp loads, and what the consumer warpgroups compute.
#pragma once

#include "config.h"
#include "forward_params.h"
#include "gmma.cuh"
#include "pipeline.cuh"
#include "row_loader.cuh"
#include "softmax.cuh"

namespace lemo::cuda::attention::hopper {

// The key tiles of a query tile, in the order they are visited: the diagonal first, so that only the first tiles need
// masks.
template <int kQueries, int kKeys, bool kListed>
struct KeyWalk {
  int count;   // tiles
  int masked;  // how many of them, from the first, hold keys that some query does not see
  int last;    // without lists: the tile visited first
  const int32_t* list;

  __device__ __forceinline__ KeyWalk(const TileLists& lists, const Tile& tile, int slot, int query_tile) {
    if constexpr (kListed) {
      const int begin = lists.offsets[slot];
      list = lists.blocks + begin - 1;
      count = 1 + lists.offsets[slot + 1] - begin;
      masked = 1;
      last = query_tile;
    } else {
      const int query_start = query_tile * kQueries;
      list = nullptr;
      last = (min(query_start + kQueries, tile.length) + kKeys - 1) / kKeys - 1;
      count = last + 1;
      masked = count - (query_start + 1) / kKeys;
    }
  }
  __device__ __forceinline__ int operator[](int step) const {
    if constexpr (kListed) return step == 0 ? last : list[step];
    return last - step;
  }
};

template <typename T, int kHeadDim, bool kListed>
struct ForwardMainloop {
  static constexpr ForwardTile kShape = kForwardShape<kHeadDim, kListed>;
  static constexpr int kQueries = kShape.queries, kKeys = kShape.keys, kStages = kShape.stages;
  static constexpr int kConsumers = kQueries / 64;
  using Element = GmmaElement<T>;
  using Walk = KeyWalk<kQueries, kKeys, kListed>;
  using QueryLoader = RowLoader<kQueries, kHeadDim>;
  using KeyLoader = RowLoader<kKeys, kHeadDim>;
  using QueryLayout = RowLayout<Element, kQueries, kHeadDim, 1>;
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
    alignas(1024) Element q[kQueries * kHeadDim];
    alignas(1024) Element k[kStages * kKeys * kHeadDim];
    alignas(1024) Element v[kStages * kKeys * kHeadDim];
    Ring<1> queries;
    Ring<kStages> keys, values;
  };

  struct ProducerState {
    cutlass::PipelineState<1> query = Ring<1>::producer_start();
    cutlass::PipelineState<kStages> key = Ring<kStages>::producer_start(), value = key;
  };
  struct ConsumerState {
    cutlass::PipelineState<1> query;
    cutlass::PipelineState<kStages> key, value;
  };

  // The producer warp. A value tile follows one key tile behind: that is the order in which they are needed.
  static __device__ __forceinline__ void load(const ForwardKernelParams& params, Shared& shared, ProducerState& state,
                                              const Tile& tile, const Walk& walk, int query_tile, int head) {
    constexpr int kTile = kKeys * kHeadDim;
    const int key_head = head / params.group;
    {
      const QueryLoader loader(params.documents, tile);
      const auto rows = loader.find(query_tile * kQueries);
      uint64_t* barrier = shared.queries.acquire(state.query, QueryLoader::kBytes);
      loader.load(rows, params.q, head, barrier, shared.q);
      ++state.query;
    }
    // The row map is read one step ahead: under load its latency is close to the length of a step.
    const KeyLoader loader(params.documents, tile);
    auto next = loader.fetch(walk[0] * kKeys);
    typename KeyLoader::Runs keys, values;
#pragma unroll 1
    for (int step = 0; step <= walk.count; ++step) {
      if (step < walk.count) {
        keys = loader.resolve(next);
        if (step + 1 < walk.count) next = loader.fetch(walk[step + 1] * kKeys);
        uint64_t* barrier = shared.keys.acquire(state.key, KeyLoader::kBytes);
        loader.load(keys, params.k, key_head, barrier, shared.k + state.key.index() * kTile);
        ++state.key;
      }
      if (step > 0) {
        uint64_t* barrier = shared.values.acquire(state.value, KeyLoader::kBytes);
        loader.load(values, params.v, key_head, barrier, shared.v + state.value.index() * kTile);
        ++state.value;
      }
      values = keys;
    }
  }

  // A consumer warpgroup: `out` receives the sum over keys, not yet divided by the softmax's sum.
  template <class Out>
  static __device__ __forceinline__ void compute(const ForwardKernelParams& params, Shared& shared,
                                                 ConsumerState& state, const Walk& walk, int query_tile, int consumer,
                                                 RowSoftmax& softmax, Out& out) {
    using namespace cute;
    ScoreMma score_mma;
    ValueMma value_mma;
    const Tensor q = make_tensor(make_smem_ptr(shared.q), QueryLayout{});
    const Tensor k = make_tensor(make_smem_ptr(shared.k), KeyLayout{});
    const Tensor v = make_tensor(make_smem_ptr(shared.v), ValueLayout{});
    const auto score_slice = score_mma.get_slice(consumer * 128);
    const auto value_slice = value_mma.get_slice(consumer * 128);
    const Tensor q_fragments = score_slice.partition_fragment_A(q(_, _, _0{}));
    const Tensor k_fragments = score_slice.partition_fragment_B(k);
    const Tensor v_fragments = value_slice.partition_fragment_B(v);
    const float scale_log2 = params.scale_log2;
    const int lane_row =
        query_tile * kQueries + consumer * 64 + thread_index() % 128 / 32 * 16 + thread_index() % 32 / 4;

    const auto mask = [&](auto& s, int step) {
      const int visible = lane_row - walk[step] * kKeys - thread_index() % 4 * 2;  // of the upper row
#pragma unroll
      for (int j = 0; j < size(s); ++j) {
        if (j / 4 * 8 + j % 2 > visible + j / 2 % 2 * 8) s(j) = -INFINITY;
      }
    };
    // P as the left operand of its product: the accumulator's layout is the operand's.
    auto p = make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<kKeys / 16>>>{});
    const auto round = [&](auto const& s) {
      auto packed = recast<uint32_t>(p);
#pragma unroll
      for (int j = 0; j < size(s); j += 2) packed(j / 2) = pack<T>(s(j), s(j + 1));
    };

    int step = 0;
    shared.queries.wait(state.query);
    if constexpr (kQueries % kKeys != 0) {
      // This warpgroup's rows may end before the keys of the tile that is visited first: it leaves that tile out.
      if (walk.count > 1 && query_tile * kQueries + consumer * 64 + 63 < walk[0] * kKeys) {
        shared.keys.wait(state.key);
        shared.keys.release(state.key);
        ++state.key;
        shared.values.wait(state.value);
        shared.values.release(state.value);
        ++state.value;
        step = 1;
      }
    }
    {
      Tensor s = partition_fragment_C(score_mma, Shape<Int<kQueries>, Int<kKeys>>{});
      shared.keys.wait(state.key);
      if (step > 0) Turns<kConsumers>::take(consumer);
      issue<true>(score_mma, q_fragments, k_fragments(_, _, _, state.key.index()), s);
      if (step > 0) Turns<kConsumers>::pass(consumer);
      warpgroup_wait<0>();
      shared.keys.release(state.key);
      ++state.key;
      mask(s, step);
      softmax.template update<true>(s, scale_log2);
      round(s);
      clear(out);
    }
    ++step;
    // A step: scores of this tile and values of the one before run together, with this tile's softmax behind them.
    const auto step_over = [&](int step, auto masked) {
      constexpr bool kMasked = decltype(masked)::value;
      Tensor s = partition_fragment_C(score_mma, Shape<Int<kQueries>, Int<kKeys>>{});
      shared.keys.wait(state.key);
      Turns<kConsumers>::take(consumer);
      issue<true>(score_mma, q_fragments, k_fragments(_, _, _, state.key.index()), s);
      shared.values.wait(state.value);
      issue<false>(value_mma, p, v_fragments(_, _, _, state.value.index()), out);
      Turns<kConsumers>::pass(consumer);
      warpgroup_wait<1>();
      warpgroup_fence_operand(s);
      shared.keys.release(state.key);
      ++state.key;
      if constexpr (kMasked) mask(s, step);
      softmax.template update<kMasked>(s, scale_log2);
      warpgroup_wait<0>();
      warpgroup_fence_operand(out);
      shared.values.release(state.value);
      ++state.value;
      round(s);
      softmax.rescale(out);
    };
#pragma unroll 1
    for (; step < walk.masked; ++step) step_over(step, true_type{});
#pragma unroll 1
    for (; step < walk.count; ++step) step_over(step, false_type{});
    shared.queries.release(state.query);
    ++state.query;
    shared.values.wait(state.value);
    issue<false>(value_mma, p, v_fragments(_, _, _, state.value.index()), out);
    warpgroup_wait<0>();
    warpgroup_fence_operand(out);
    shared.values.release(state.value);
    ++state.value;
  }
};

}  // namespace lemo::cuda::attention::hopper
