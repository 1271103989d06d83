// A tile of queries against a unit of keys: what the producer warp loads, and the sums over heads that the consumer
// warpgroups keep in registers.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "common/document_tiles.cuh"
#include "common/mma.cuh"
#include "common/sm90/gmma.cuh"
#include "common/sm90/pipeline.cuh"
#include "scores/sm90/scores_params.h"

namespace lemo::cuda::scoring::sm90 {

// As many stages as 227 KiB of shared memory hold; a stage of keys serves all query heads of its group.
template <int kHeadDim>
constexpr int kQueryStages = kHeadDim == 64 ? 6 : 3;
template <int kHeadDim>
constexpr int kKeyStages = kHeadDim == 64 ? 3 : 2;

template <typename T, int kHeadDim>
struct Mainloop {
  static constexpr int kConsumers = kQueries / 64, kHalfKeys = kKeys / 2;
  static constexpr int kQueryRing = kQueryStages<kHeadDim>, kKeyRing = kKeyStages<kHeadDim>;
  static constexpr int kColumns = kBoxColumns<kHeadDim>, kSlabs = kHeadDim / kColumns;
  using Element = GmmaElement<T>;
  using QueryLayout = RowLayout<Element, kQueries, kHeadDim, kQueryRing>;
  using KeyLayout = RowLayout<Element, kHalfKeys, kHeadDim, 2 * kKeyRing>;
  using ScoreMma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float,
                                 cute::Shape<cute::Int<kQueries>, cute::Int<kHalfKeys>, cute::Int<kHeadDim>>>(),
      cute::Layout<cute::Shape<cute::Int<kConsumers>, cute::_1, cute::_1>>{}));

  struct Shared {
    alignas(1024) Element q[kQueryRing * kQueries * kHeadDim];
    alignas(1024) Element k[kKeyRing * kKeys * kHeadDim];
    Ring<kQueryRing> queries;
    Ring<kKeyRing> keys;
  };

  struct ProducerState {
    cutlass::PipelineState<kQueryRing> query = Ring<kQueryRing>::producer_start();
    cutlass::PipelineState<kKeyRing> key = Ring<kKeyRing>::producer_start();
  };
  struct ConsumerState {
    cutlass::PipelineState<kQueryRing> query;
    cutlass::PipelineState<kKeyRing> key;
  };

  // kTiles tiles of 128 rows from `row` on, a box per lane. Rows of the next document are loaded as well, but never
  // used; rows beyond the tensor are zeros.
  template <int kTiles>
  static __device__ __forceinline__ void load_rows(const RowTensor& tensor, int head, int row, uint64_t* barrier,
                                                   Element* target) {
    constexpr int kBoxes = kTiles * kSlabs * 2;
    static_assert(kQueries == 2 * kRunRows && kHalfKeys == 2 * kRunRows && kBoxes <= 32);
    const int box = thread_index() % 32;
    if (box < kBoxes) {
      const int run = box % 2, slab = box / 2 % kSlabs, tile = box / (2 * kSlabs);
      cute::SM90_TMA_LOAD_3D::copy(&tensor.run, barrier, static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                                   target + box * kRunRows * kColumns, slab * kColumns, head,
                                   row + tile * kHalfKeys + run * kRunRows);
    }
  }

  static __device__ __forceinline__ void load(const KernelParams& params, Shared& shared, ProducerState& state,
                                              int query_row, int key_row) {
    constexpr int kQueryTile = kQueries * kHeadDim, kKeyTile = kKeys * kHeadDim;
    int head = 0;
#pragma unroll 1
    for (int key_head = 0; head < params.base.heads; ++key_head) {
      uint64_t* barrier = shared.keys.acquire(state.key, kKeyTile * 2);
      load_rows<2>(params.k, key_head, key_row, barrier, shared.k + state.key.index() * kKeyTile);
      ++state.key;
#pragma unroll 1
      for (const int end = head + params.base.group; head < end; ++head) {
        barrier = shared.queries.acquire(state.query, kQueryTile * 2);
        load_rows<1>(params.q, head, query_row, barrier, shared.q + state.query.index() * kQueryTile);
        ++state.query;
      }
    }
  }

  // A consumer warpgroup: sums[half][j] = sum over heads of max(q.k, 0), the halves' elements in the order of wgmma's
  // accumulators. The second half stays zero unless `both`.
  static __device__ __forceinline__ void compute(const KernelParams& params, Shared& shared, ConsumerState& state,
                                                 bool both, int consumer, float (&sums)[2][kHalfKeys / 2]) {
    using namespace cute;
    ScoreMma mma;
    const Tensor q = make_tensor(make_smem_ptr(shared.q), QueryLayout{});
    const Tensor k = make_tensor(make_smem_ptr(shared.k), KeyLayout{});
    const auto slice = mma.get_slice(consumer * 128);
    const Tensor q_fragments = slice.partition_fragment_A(q);
    const Tensor k_fragments = slice.partition_fragment_B(k);
    Tensor s = partition_fragment_C(mma, Shape<Int<kQueries>, Int<kHalfKeys>>{});
    static_assert(decltype(size(s))::value == kHalfKeys / 2);
#pragma unroll
    for (int j = 0; j < kHalfKeys / 2; ++j) sums[0][j] = sums[1][j] = 0.0f;

    const auto multiply = [&](int half) {
      Turns<kConsumers>::take(consumer);
      issue<true>(mma, q_fragments(_, _, _, state.query.index()), k_fragments(_, _, _, 2 * state.key.index() + half),
                  s);
      Turns<kConsumers>::pass(consumer);
      warpgroup_wait<0>();
      warpgroup_fence_operand(s);
    };
    const auto add = [&](float (&target)[kHalfKeys / 2]) {
#pragma unroll
      for (int j = 0; j < kHalfKeys / 2; ++j) target[j] += max_nan(s(j), 0.0f);
    };
    int left = 0;  // query heads of the group
#pragma unroll 1
    for (int head = 0; head < params.base.heads; ++head) {
      if (left == 0) {
        shared.keys.wait(state.key);
        left = params.base.group;
      }
      --left;
      shared.queries.wait(state.query);
      multiply(0);
      if (both) {
        add(sums[0]);
        multiply(1);
      }
      shared.queries.release(state.query);
      ++state.query;
      if (left == 0) {
        shared.keys.release(state.key);
        ++state.key;
      }
      if (both) {
        add(sums[1]);
      } else {
        add(sums[0]);
      }
    }
  }
};

}  // namespace lemo::cuda::scoring::sm90
