// One key tile against the query tiles that see it: what the consumer warpgroups compute of what the producer warp
// loads (backward_load.cuh).
//
// Scores are computed transposed, S^T = K Q^T and dP^T = V dO^T, with 64 keys per warpgroup: P^T and dS^T are then the
// left operands of the warpgroup's own dV and dK straight from registers, and no two warpgroups share a sum. Only
// dQ = dS K sums over the keys of both: dS passes through shared memory, double-buffered, with one barrier per step.
//
// The order of a step follows from what the tensor cores would otherwise wait for: the next S runs behind the stores of
// dQ, dK (kLateKeys) behind the next exponentials. 128 queries are taken in two parts, so that dP of one part at a time
// takes registers, and dV of the first part runs behind the exponentials of the second. Every product is waited for in
// the loop body that issued it, which is what ptxas needs to keep products asynchronous.
#pragma once

#include "attention/sm90/backward_adder.cuh"
#include "attention/sm90/backward_edges.cuh"
#include "attention/sm90/backward_lists.cuh"
#include "attention/sm90/backward_weights.cuh"
#include "attention/sm90/soft_cap.cuh"
#include "attention/softmax.cuh"
#include "common/sm90/gmma.cuh"
#include "common/sm90/pipeline.cuh"
#include "common/sm90/row_loader.cuh"

namespace lemo::cuda::attention::sm90 {

template <typename T, int kHeadDim, bool kWeighted, Visits kVisits, bool kSoftCap>
struct BackwardMainloop {
  static constexpr bool kListed = kVisits == Visits::kListed, kWindow = kVisits == Visits::kWindow;
  static constexpr BackwardTile kShape = kBackwardTile<kHeadDim>;
  static constexpr int kKeys = kBackwardKeys, kQueries = kShape.queries;
  static constexpr int kQueryStages = kShape.query_stages, kDoutStages = kShape.dout_stages;
  static constexpr bool kLateKeys = kShape.late_keys && (!kWeighted || kQueries == 128);
  static constexpr int kParts = kQueries / 64;
  static constexpr bool kByRows = DqOrder<kHeadDim>::kByRows;
  static constexpr int kTile = kQueries * kHeadDim;
  // Columns of the product for dQ: head_dim 96 runs as 128, so that both warpgroups have the same shape. What follows K
  // in shared memory only enters columns that are never stored.
  static constexpr int kDqColumns = kByRows ? 64 : 128;
  static_assert(kByRows ? kHeadDim == 64 : kQueries == 64 && kHeadDim > 64);
  static_assert(kQueryStages > (kLateKeys ? 2 : 1));

  using Element = GmmaElement<T>;
  using Walk = std::conditional_t<kListed, ListedWalk<kQueries>, QueryWalk<kQueries, kWindow>>;
  using QueryLoader = RowLoader<kQueries, kHeadDim, kQueries, true>;
  using KeyLoader = RowLoader<kKeys, kHeadDim>;
  using KeyLayout = RowLayout<Element, kKeys, kHeadDim, 1>;
  using QueryLayout = RowLayout<Element, kQueries, kHeadDim, kQueryStages>;
  using DoutParts = RowLayout<Element, 64, kHeadDim, kDoutStages * kParts>;
  static_assert(kParts == 1 || kHeadDim == 64);
  using QueryColumns = TransposedLayout<Element, kQueries, kHeadDim, kQueryStages>;
  using DoutColumns = TransposedLayout<Element, kQueries, kHeadDim, kDoutStages>;
  using KeyColumns = decltype(cute::tile_to_shape(ColumnAtom<Element, kHeadDim>{},
                                                  cute::Shape<cute::Int<kDqColumns>, cute::Int<kKeys>>{},
                                                  cute::Step<cute::_2, cute::_1>{}));
  using ScoreColumns = TransposedLayout<Element, kKeys, kQueries, 2>;  // dS^T in memory, seen as [queries, keys]
  using ByKeys = cute::Layout<cute::Shape<cute::Int<kBackwardConsumers>, cute::_1, cute::_1>>;
  using ByColumns = cute::Layout<cute::Shape<cute::_1, cute::Int<kBackwardConsumers>, cute::_1>>;
  template <int kColumns>
  using KeysBy = cute::Shape<cute::Int<kKeys>, cute::Int<kColumns>, cute::Int<kHeadDim>>;
  using ScoreMma =
      decltype(cute::make_tiled_mma(cute::GMMA::ss_op_selector<Element, Element, float, KeysBy<kQueries>>(), ByKeys{}));
  using PartMma = decltype(cute::make_tiled_mma(
      std::conditional_t<kShape.held_values,
                         decltype(cute::GMMA::rs_op_selector<Element, Element, float, KeysBy<64>>()),
                         decltype(cute::GMMA::ss_op_selector<Element, Element, float, KeysBy<64>>())>{},
      ByKeys{}));
  using KeyMma = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float,
                                 cute::Shape<cute::Int<kKeys>, cute::Int<kHeadDim>, cute::Int<kQueries>>,
                                 cute::GMMA::Major::K, cute::GMMA::Major::MN>(),
      ByKeys{}));
  using QueryMma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, cute::Shape<cute::Int<kQueries>, cute::_64, cute::Int<kKeys>>,
                                 cute::GMMA::Major::MN, cute::GMMA::Major::MN>(),
      std::conditional_t<kByRows, ByKeys, ByColumns>{}));

  struct Shared {
    alignas(1024) Element k[kKeys * kHeadDim];
    alignas(1024) Element v[kKeys * kHeadDim];
    alignas(1024) Element q[kQueryStages * kTile];
    alignas(1024) Element dout[kDoutStages * kTile];
    alignas(1024) Element ds[2 * kKeys * kQueries];
    alignas(128) float dq[DqOrder<kHeadDim>::kSize];
    alignas(128) float stats[kQueryStages][2 * kQueries];  // lse, delta
    Ring<kQueryStages> queries;
    Ring<kDoutStages> douts;
    FullBarrier keys;
    SumHandover sums;
    BackwardStep steps[kQueryStages];
    int start, total;
    typename Walk::Storage walk;
    std::conditional_t<kWeighted, KeyWeights, NoWeights> weights;
    std::conditional_t<kWindow, KeyEdges, NoEdges> edges;
  };

  static __device__ __forceinline__ void init(Shared& shared) {
    shared.queries.init(kBackwardWarps, 1);
    shared.douts.init(kBackwardWarps);
    shared.keys.init(1);
    shared.sums.init();
  }

  static __device__ __forceinline__ Walk walk(const BackwardKernelParams& params, Shared& shared, const KeyWork& work) {
    return Walk(params, work, shared.start, params.turns == nullptr ? work.tile.index % params.group : 0, shared.walk);
  }
  // Where to begin, and how many steps there are. Called by one warp, before the others start.
  static __device__ __forceinline__ void choose_start(const BackwardKernelParams& params, Shared& shared,
                                                      const KeyWork& work) {
    const int start = Walk::choose_start(params, work);
    if (thread_index() == 0) {
      shared.start = start;
      shared.total = Walk::count_steps(params, work);
    }
  }
  // An adding thread.
  static __device__ __forceinline__ void add(const BackwardKernelParams& params, Shared& shared, const KeyWork& work,
                                             int adder) {
    add_sums<kHeadDim, Walk>(params, work, adder, shared.total, shared.queries, shared.steps, shared.dq, shared.sums);
  }

  // A consumer warpgroup: computes dk (not yet scaled) and dv of its 64 keys.
  template <class Gradient>
  static __device__ __forceinline__ void compute(const BackwardKernelParams& params, Shared& shared,
                                                 const KeyWork& work, int consumer, Gradient& dk, Gradient& dv) {
    using namespace cute;
    ScoreMma score_mma;
    PartMma part_mma;
    KeyMma key_mma;
    QueryMma query_mma;
    const auto score_slice = score_mma.get_slice(consumer * 128);
    const auto part_slice = part_mma.get_slice(consumer * 128);
    const auto key_slice = key_mma.get_slice(consumer * 128);
    const auto query_slice = query_mma.get_slice(consumer * 128);
    const Tensor k_rows = make_tensor(make_smem_ptr(shared.k), KeyLayout{});
    const Tensor v_rows = make_tensor(make_smem_ptr(shared.v), KeyLayout{});
    const Tensor k_a = score_slice.partition_fragment_A(k_rows(_, _, _0{}));
    shared.keys.wait(0);
    const auto v_a = [&] {
      if constexpr (kShape.held_values) {
        return hold_rows<kKeys, kHeadDim>(shared.v, consumer * 64);
      } else {
        return part_slice.partition_fragment_A(v_rows(_, _, _0{}));
      }
    }();
    const Tensor q_b = score_slice.partition_fragment_B(make_tensor(make_smem_ptr(shared.q), QueryLayout{}));
    const Tensor dout_b = part_slice.partition_fragment_B(make_tensor(make_smem_ptr(shared.dout), DoutParts{}));
    const Tensor q_columns = key_slice.partition_fragment_B(make_tensor(make_smem_ptr(shared.q), QueryColumns{}));
    const Tensor dout_columns = key_slice.partition_fragment_B(make_tensor(make_smem_ptr(shared.dout), DoutColumns{}));
    const Tensor ds_a = query_slice.partition_fragment_A(make_tensor(make_smem_ptr(shared.ds), ScoreColumns{}));
    const Tensor k_columns = query_slice.partition_fragment_B(make_tensor(make_smem_ptr(shared.k), KeyColumns{}));

    using Scores = decltype(partition_fragment_C(score_mma, Shape<Int<kKeys>, Int<kQueries>>{}));
    using Operand = decltype(make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<kQueries / 16>>>{}));
    using PartScores = decltype(partition_fragment_C(part_mma, Shape<Int<kKeys>, _64>{}));
    constexpr int kSize = size(PartScores{});

    const float scale_log2 = params.scale_log2;
    [[maybe_unused]] const float tanh_factor = params.tanh_factor;
    const int warp_key = consumer * 64 + thread_index() / 32 % 4 * 16;  // within the tile
    const int lane_key = work.key_start + warp_key + thread_index() % 32 / 4;
    const int masked_before = work.key_start + consumer * 64 + 63;
    // This lane's 16 bytes for stmatrix: matrices 0 to 3 are (upper, left), (lower, left), (upper, right), ...
    const uint32_t ds_lane = shared_address(shared.ds) + (warp_key + thread_index() % 16) * 128;
    const uint32_t ds_chunk = (thread_index() % 32 / 16 ^ thread_index() % 8) * 16;
    shared.weights.load(params, work);
    shared.edges.load(params, work);
    SumWriter<kHeadDim> sums(shared.dq, shared.sums);

    cutlass::PipelineState<kQueryStages> query, before;
    cutlass::PipelineState<kDoutStages> dout;
    int left = shared.total;
    Scores s;
    Operand p, ds;
    auto packed_p = recast<uint32_t>(p), packed_ds = recast<uint32_t>(ds);
    clear(dk);
    clear(dv);
    clear(ds);
    shared.queries.wait(query);
    issue<true>(score_mma, k_a, q_b(_, _, _, query.index()), s);
    warpgroup_wait<0>();
    warpgroup_fence_operand(s);
    uint32_t buffer = 0;
    bool first = true;
#pragma unroll 1
    while (true) {
      shared.douts.wait(dout);
      const int query_start = shared.steps[query.index()].query_tile * kQueries;
      const float* stats = shared.stats[query.index()] + thread_index() % 4 * 2;
      const uint32_t ds_target = ds_lane + buffer * (kKeys * kQueries * 2);
      // P and dS of 64 queries, which are elements kBegin to kEnd of S.
      const auto differentiate = [&](auto constant) {
        constexpr int kPart = decltype(constant)::value, kBegin = kPart * kSize, kEnd = kBegin + kSize;
        PartScores dp;
        issue<true>(part_mma, v_a, dout_b(_, _, _, dout.index() * kParts + kPart), dp);
        // dK of the previous step runs behind this step's exponentials. (ds is 0 in the first step.)
        if constexpr (kLateKeys) issue<false, kPart, kParts>(key_mma, ds, q_columns(_, _, _, before.index()), dk);
        if constexpr (kPart > 0) issue<false, kPart - 1, kParts>(key_mma, p, dout_columns(_, _, _, dout.index()), dv);
        if (kPart == 0 && !first) sums.send(buffer ^ 1);
        if constexpr (kSoftCap) {
          // dP has to be there before P overwrites tanh: registers hold no third tile.
          warpgroup_wait<(kLateKeys ? 1 : 0) + (kPart > 0 ? 1 : 0)>();
          warpgroup_fence_operand(dp);
#pragma unroll
          for (int j = kBegin; j < kEnd; j += 4) {
            const float2 lse = *reinterpret_cast<const float2*>(stats + j * 2);
            const float2 delta = *reinterpret_cast<const float2*>(stats + kQueries + j * 2);
#pragma unroll
            for (int c = j; c < j + 4; c += 2) {
              tanh_pair(s(c), s(c + 1), tanh_factor);
              dp(c - kBegin) = (dp(c - kBegin) - delta.x) * fmaf(-s(c), s(c), 1.0f);
              dp(c - kBegin + 1) = (dp(c - kBegin + 1) - delta.y) * fmaf(-s(c + 1), s(c + 1), 1.0f);
              s(c) = exp2_fast(fmaf(s(c), scale_log2, -lse.x));
              s(c + 1) = exp2_fast(fmaf(s(c + 1), scale_log2, -lse.y));
            }
          }
        } else {
#pragma unroll
          for (int j = kBegin; j < kEnd; j += 4) {
            const float2 lse = *reinterpret_cast<const float2*>(stats + j * 2);
            s(j) = exp2_fast(fmaf(s(j), scale_log2, -lse.x));
            s(j + 1) = exp2_fast(fmaf(s(j + 1), scale_log2, -lse.y));
            s(j + 2) = exp2_fast(fmaf(s(j + 2), scale_log2, -lse.x));
            s(j + 3) = exp2_fast(fmaf(s(j + 3), scale_log2, -lse.y));
          }
        }
        if (query_start + kPart * 64 < masked_before) {
          const int hidden = lane_key - query_start - thread_index() % 4 * 2;  // columns before it do not see the key
#pragma unroll
          for (int j = kBegin; j < kEnd; ++j) {
            if (j / 4 * 8 + j % 2 < hidden + j / 2 % 2 * 8) s(j) = 0.0f;
          }
        }
        if constexpr (kWindow) shared.edges.template hide<kBegin, kEnd>(query_start, s);
        if constexpr (kWeighted) shared.weights.template apply<kBegin, kEnd>(params, work, query_start, s);
        const auto round_p = [&] {
#pragma unroll
          for (int j = kBegin; j < kEnd; j += 2) packed_p(j / 2) = pack<T>(s(j), s(j + 1));
        };
        if constexpr (!kLateKeys) round_p();
        if constexpr (kSoftCap) {
#pragma unroll
          for (int j = kBegin; j < kEnd; ++j) dp(j - kBegin) *= s(j);
        } else {
          warpgroup_wait<(kLateKeys ? 1 : 0) + (kPart > 0 ? 1 : 0)>();
          warpgroup_fence_operand(dp);
#pragma unroll
          for (int j = kBegin; j < kEnd; j += 4) {
            const float2 delta = *reinterpret_cast<const float2*>(stats + kQueries + j * 2);
            const int i = j - kBegin;
            dp(i) = s(j) * (dp(i) - delta.x);
            dp(i + 1) = s(j + 1) * (dp(i + 1) - delta.y);
            dp(i + 2) = s(j + 2) * (dp(i + 2) - delta.x);
            dp(i + 3) = s(j + 3) * (dp(i + 3) - delta.y);
          }
        }
        if constexpr (kLateKeys) {
          warpgroup_wait<(kPart > 0 ? 1 : 0)>();  // dK, whose operand is overwritten next; dV keeps running
          warpgroup_fence_operand(dk);
          round_p();
        }
#pragma unroll
        for (int n = kBegin / 8; n < kEnd / 8; ++n) {
          const int i = n * 8 - kBegin;
#pragma unroll
          for (int j = 0; j < 8; j += 2) packed_ds(n * 4 + j / 2) = pack<T>(dp(i + j), dp(i + j + 1));
          store_matrices(ds_target + n / 4 * (kKeys * 128) + (ds_chunk ^ (n % 4 * 32)), packed_ds(n * 4),
                         packed_ds(n * 4 + 1), packed_ds(n * 4 + 2), packed_ds(n * 4 + 3));
        }
      };
      differentiate(_0{});
      if constexpr (kParts == 2) differentiate(_1{});
      if constexpr (kLateKeys) {
        if (!first) shared.queries.release(before);
        before = query;
      }
      cutlass::arch::fence_view_async_shared();

      issue<false, kParts - 1, kParts>(key_mma, p, dout_columns(_, _, _, dout.index()), dv);
      cutlass::arch::NamedBarrier::sync(kBackwardConsumers * 128, kBackwardConsumersMeet);
      auto dq = partition_fragment_C(query_mma, Shape<Int<kQueries>, Int<kDqColumns>>{});
      issue<true>(query_mma, ds_a(_, _, _, buffer), k_columns, dq);
      warpgroup_wait<1>();
      warpgroup_fence_operand(dv);
      shared.douts.release(dout);
      ++dout;
      if constexpr (!kLateKeys) issue<false>(key_mma, ds, q_columns(_, _, _, query.index()), dk);
      auto next = query;
      ++next;
      const bool more = --left > 0;
      if (more) shared.queries.wait(next);
      issue<true>(score_mma, k_a, q_b(_, _, _, next.index()), s);  // after the last step, on a stale stage: unused
      warpgroup_wait<kLateKeys ? 1 : 2>();
      warpgroup_fence_operand(dq);
      sums.stage(buffer, dq);
      if constexpr (!kLateKeys) {
        warpgroup_wait<1>();
        warpgroup_fence_operand(dk);
        shared.queries.release(query);
      }
      warpgroup_wait<0>();
      warpgroup_fence_operand(s);
      query = next;
      buffer ^= 1;
      first = false;
      if (!more) break;
    }
    if constexpr (kLateKeys) {
      issue<false>(key_mma, ds, q_columns(_, _, _, before.index()), dk);
      warpgroup_wait<0>();
      warpgroup_fence_operand(dk);
    }
    sums.send(buffer ^ 1);
  }
};

}  // namespace lemo::cuda::attention::sm90
