// The backward kernel for head_dim 256: one thread block per 64 keys and key head, one producer warp, two consumer
// warpgroups.
//
// A warpgroup's registers hold dK and dV of 64 keys for half of the columns. Both share the 64 keys: each computes S^T
// and dP^T for half of a step's queries, P^T and dS^T pass through shared memory, double-buffered, and each multiplies
// all of them by its half of the columns of dO, Q and K. Nothing is computed twice. dQ goes from registers to the sums
// in device memory, for which shared memory has no room.
//
// Always with a window (window_edges.h), which may hide nothing; dQ is added in any order; neither lists nor weights.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "attention/sm90/backward_load.cuh"
#include "attention/sm90/backward_walk.cuh"
#include "attention/sm90/soft_cap.cuh"
#include "attention/sm90/staged_rows.cuh"
#include "attention/softmax.cuh"
#include "common/sm90/gmma.cuh"
#include "common/sm90/pipeline.cuh"
#include "common/sm90/row_loader.cuh"

namespace lemo::cuda::attention::sm90 {

__device__ __forceinline__ void add_four(float* target, float a, float b, float c, float d) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(target), "f"(a), "f"(b), "f"(c),
               "f"(d)
               : "memory");
}

template <typename T, bool kSoftCap>
struct WideBackward {
  static constexpr int kHeadDim = 256, kColumns = kHeadDim / kBackwardConsumers;  // of a warpgroup
  static constexpr int kKeys = 64, kQueries = 64;
  static constexpr int kQueryStages = kBackwardTile<kHeadDim>.query_stages,
                       kDoutStages = kBackwardTile<kHeadDim>.dout_stages;
  static constexpr int kOwnQueries = kQueries / kBackwardConsumers;
  static constexpr int kHalves = kBackwardKeys / kKeys;  // thread blocks of a key tile
  static constexpr int kTile = kQueries * kHeadDim, kScores = kKeys * kQueries;
  static_assert(kQueries == kBackwardTile<kHeadDim>.queries);  // a row of P and dS is one swizzle span

  using Element = GmmaElement<T>;
  using Walk = QueryWalk<64, true>;
  using QueryLoader = RowLoader<kQueries, kHeadDim, kQueries, true>;
  using KeyLoader = RowLoader<kKeys, kHeadDim>;
  using ByColumns = cute::Layout<cute::Shape<cute::_1, cute::Int<kBackwardConsumers>, cute::_1>>;
  using KeyLayout = RowLayout<Element, kKeys, kHeadDim, 1>;
  using KeyColumns = TransposedLayout<Element, kKeys, kHeadDim, 1>;
  using QueryLayout = RowLayout<Element, kQueries, kHeadDim, kQueryStages>;
  using QueryColumns = TransposedLayout<Element, kQueries, kHeadDim, kQueryStages>;
  using DoutLayout = RowLayout<Element, kQueries, kHeadDim, kDoutStages>;
  using DoutColumns = TransposedLayout<Element, kQueries, kHeadDim, kDoutStages>;
  using ScoreLayout = RowLayout<Element, kKeys, kQueries, 2>;          // P^T and dS^T, [keys, queries]
  using ScoreColumns = TransposedLayout<Element, kKeys, kQueries, 2>;  // the same memory, [queries, keys]
  using ScoreMma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float,
                                 cute::Shape<cute::Int<kKeys>, cute::Int<kOwnQueries>, cute::Int<kHeadDim>>>(),
      ByColumns{}));
  template <int kRows, int kDepth, cute::GMMA::Major kMajor>
  using ColumnMma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float,
                                 cute::Shape<cute::Int<kRows>, cute::Int<kColumns>, cute::Int<kDepth>>, kMajor,
                                 cute::GMMA::Major::MN>(),
      ByColumns{}));
  using KeyMma = ColumnMma<kKeys, kQueries, cute::GMMA::Major::K>;     // dK and dV
  using QueryMma = ColumnMma<kQueries, kKeys, cute::GMMA::Major::MN>;  // dQ

  struct Shared {
    alignas(1024) Element k[kKeys * kHeadDim];
    alignas(1024) Element v[kKeys * kHeadDim];
    alignas(1024) Element q[kQueryStages * kTile];
    alignas(1024) Element dout[kDoutStages * kTile];
    alignas(1024) Element p[2 * kScores];
    alignas(1024) Element ds[2 * kScores];
    alignas(128) float stats[kQueryStages][2 * kQueries];  // lse, delta
    Ring<kQueryStages> queries;
    Ring<kDoutStages> douts;
    FullBarrier keys;
    BackwardStep steps[kQueryStages];
    int start, total;
    typename Walk::Storage walk;
    int edges[kBackwardWarps][16];  // of the keys of a warp
  };
  static_assert(sizeof(Shared) <= 227 * 1024);

  static __device__ __forceinline__ KeyWork locate(const BackwardKernelParams& params, int block) {
    KeyWork work = locate_keys<kQueries>(params, block / kHalves);
    work.key_start += block % kHalves * kKeys;
    return work;
  }

  static __device__ __forceinline__ void init(Shared& shared) {
    shared.queries.init(kBackwardWarps);
    shared.douts.init(kBackwardWarps);
    shared.keys.init(1);
  }

  static __device__ __forceinline__ Walk walk(const BackwardKernelParams& params, Shared& shared, const KeyWork& work) {
    return Walk(params, work, shared.start, work.tile.index % params.group, shared.walk);
  }

  // A consumer warpgroup: computes dk (not yet scaled) and dv of its columns.
  template <class Gradient>
  static __device__ __forceinline__ void compute(const BackwardKernelParams& params, Shared& shared,
                                                 const KeyWork& work, int consumer, Gradient& dk, Gradient& dv) {
    using namespace cute;
    ScoreMma score_mma;
    KeyMma key_mma;
    QueryMma query_mma;
    const auto score_slice = score_mma.get_slice(consumer * 128);
    const auto key_slice = key_mma.get_slice(consumer * 128);
    const auto query_slice = query_mma.get_slice(consumer * 128);
    const Tensor k_rows = make_tensor(make_smem_ptr(shared.k), KeyLayout{});
    const Tensor v_rows = make_tensor(make_smem_ptr(shared.v), KeyLayout{});
    const Tensor k_all = make_tensor(make_smem_ptr(shared.k), KeyColumns{});
    const Tensor k_a = score_slice.partition_fragment_A(k_rows(_, _, _0{}));
    const Tensor v_a = score_slice.partition_fragment_A(v_rows(_, _, _0{}));
    const Tensor q_b = score_slice.partition_fragment_B(make_tensor(make_smem_ptr(shared.q), QueryLayout{}));
    const Tensor dout_b = score_slice.partition_fragment_B(make_tensor(make_smem_ptr(shared.dout), DoutLayout{}));
    const Tensor p_a = key_slice.partition_fragment_A(make_tensor(make_smem_ptr(shared.p), ScoreLayout{}));
    const Tensor ds_a = key_slice.partition_fragment_A(make_tensor(make_smem_ptr(shared.ds), ScoreLayout{}));
    const Tensor q_columns = key_slice.partition_fragment_B(make_tensor(make_smem_ptr(shared.q), QueryColumns{}));
    const Tensor dout_columns = key_slice.partition_fragment_B(make_tensor(make_smem_ptr(shared.dout), DoutColumns{}));
    const Tensor ds_rows = query_slice.partition_fragment_A(make_tensor(make_smem_ptr(shared.ds), ScoreColumns{}));
    const Tensor k_columns = query_slice.partition_fragment_B(k_all(_, _, _0{}));

    using Scores = decltype(partition_fragment_C(score_mma, Shape<Int<kKeys>, Int<kQueries>>{}));
    constexpr int kSize = size(Scores{});
    static_assert(kSize == kOwnQueries / 2);
    const float scale_log2 = params.scale_log2;
    [[maybe_unused]] const float tanh_factor = params.tanh_factor;
    // What follows from the thread's index is computed again at every use: accumulators leave no registers.
    const auto warp_key = [] { return thread_index() / 32 % 4 * 16; };  // within the tile
    const auto edges = [&] { return shared.edges[thread_index() / 32 - 4]; };
    if (thread_index() % 32 < 16) {
      const int key = work.key_start + warp_key() + thread_index() % 32;
      edges()[thread_index() % 32] = params.edges[work.tile.start + min(key, work.tile.length - 1)];
    }
    __syncwarp();

    cutlass::PipelineState<kQueryStages> query;
    cutlass::PipelineState<kDoutStages> dout;
    int left = shared.total;
    uint32_t buffer = 0;
    Scores s;
    clear(dk);
    clear(dv);
    shared.keys.wait(0);
    shared.queries.wait(query);
    issue<true>(score_mma, k_a, q_b(_, _, _, query.index()), s);
    warpgroup_wait<0>();
    warpgroup_fence_operand(s);
#pragma unroll 1
    while (true) {
      Scores dp;
      shared.douts.wait(dout);
      issue<true>(score_mma, v_a, dout_b(_, _, _, dout.index()), dp);
      const int item = shared.steps[query.index()].item;
      const int query_start = shared.steps[query.index()].query_tile * kQueries + consumer * kOwnQueries;
      const float* stats = shared.stats[query.index()] + consumer * kOwnQueries + thread_index() % 4 * 2;
      [[maybe_unused]] float slope[kSize];  // of the soft-cap
      if constexpr (kSoftCap) {
        soft_cap<0, kSize>(s, tanh_factor);
#pragma unroll
        for (int j = 0; j < kSize; ++j) slope[j] = fmaf(-s(j), s(j), 1.0f);
      }
#pragma unroll
      for (int j = 0; j < kSize; ++j) s(j) = exp2_fast(fmaf(s(j), scale_log2, -stats[j / 4 * 8 + j % 2]));
      if (query_start < work.key_start + kKeys - 1) {
        // Queries before it do not see the key.
        const int key = work.key_start + warp_key() + thread_index() % 32 / 4;
        const int hidden = key - query_start - thread_index() % 4 * 2;
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          if (j / 4 * 8 + j % 2 < hidden + j / 2 % 2 * 8) s(j) = 0.0f;
        }
      }
      if (query_start + kOwnQueries > edges()[0]) {  // edges ascend
        const int column = query_start + thread_index() % 4 * 2, row = thread_index() % 32 / 4;
        const int seen[2] = {edges()[row] - column, edges()[row + 8] - column};
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          if (j / 4 * 8 + j % 2 >= seen[j / 2 % 2]) s(j) = 0.0f;
        }
      }
      warpgroup_wait<0>();
      warpgroup_fence_operand(dp);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        dp(j) = s(j) * (dp(j) - stats[kQueries + j / 4 * 8 + j % 2]);
        if constexpr (kSoftCap) dp(j) *= slope[j];
      }
      const auto store = [&](const Element* scores, const auto& from) {
        // This lane's 16 bytes for stmatrix: matrices 0 to 3 are (upper, left), (lower, left), (upper, right), ...
        const uint32_t address =
            shared_address(scores) + buffer * (kScores * 2) + (warp_key() + thread_index() % 16) * 128;
        const uint32_t chunk = (thread_index() % 32 / 16 ^ thread_index() % 8) * 16;
#pragma unroll
        for (int n = 0; n < kSize / 8; ++n) {
          uint32_t packed[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) packed[j] = pack<T>(from(n * 8 + j * 2), from(n * 8 + j * 2 + 1));
          store_matrices(address + (chunk ^ ((consumer * (kSize / 8) + n) * 32)), packed[0], packed[1], packed[2],
                         packed[3]);
        }
      };
      store(shared.p, s);
      store(shared.ds, dp);
      cutlass::arch::fence_view_async_shared();
      // Both warpgroups' P and dS are there, and nobody reads those of the step before the previous one.
      cutlass::arch::NamedBarrier::sync(kBackwardConsumers * 128, kBackwardConsumersMeet);
      auto dq = partition_fragment_C(query_mma, Shape<Int<kQueries>, Int<kHeadDim>>{});
      issue<true>(query_mma, ds_rows(_, _, _, buffer), k_columns, dq);
      issue<false>(key_mma, p_a(_, _, _, buffer), dout_columns(_, _, _, dout.index()), dv);
      issue<false>(key_mma, ds_a(_, _, _, buffer), q_columns(_, _, _, query.index()), dk);
      // dQ leaves behind dV and dK, and the next S then follows them.
      warpgroup_wait<2>();
      warpgroup_fence_operand(dq);
      float* to = params.dq_sums + static_cast<int64_t>(item) * DqOrder<kHeadDim>::kSize +
                  DqOrder<kHeadDim>::offset(consumer, thread_index() / 32 % 4) + thread_index() % 32 * 4;
#pragma unroll
      for (int i = 0; i < kColumns / 8; ++i) {
        add_four(to + i * DqOrder<kHeadDim>::kChunkFloats, dq(4 * i), dq(4 * i + 1), dq(4 * i + 2), dq(4 * i + 3));
      }
      auto next = query;
      ++next;
      const bool more = --left > 0;
      if (more) shared.queries.wait(next);
      issue<true>(score_mma, k_a, q_b(_, _, _, next.index()), s);  // after the last step, on a stale stage: unused
      warpgroup_wait<1>();
      warpgroup_fence_operand(dv);
      warpgroup_fence_operand(dk);
      shared.douts.release(dout);
      ++dout;
      shared.queries.release(query);
      warpgroup_wait<0>();
      warpgroup_fence_operand(s);
      query = next;
      buffer ^= 1;
      if (!more) break;
    }
  }
};

template <typename T, bool kSoftCap>
__global__ void __launch_bounds__((kBackwardConsumers + 1) * 128, 1)
    wide_backward_kernel_sm90(const __grid_constant__ BackwardKernelParams params) {
  using Wide = WideBackward<T, kSoftCap>;
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& shared = *reinterpret_cast<typename Wide::Shared*>(raw);
  const KeyWork work = Wide::locate(params, static_cast<int>(blockIdx.x));
  if (work.tile.index >= work.tile.count || work.key_start >= work.tile.length) return;
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  if (threadIdx.x < 32) {
    const int start = Wide::Walk::choose_start(params, work);
    if (threadIdx.x == 0) {
      Wide::init(shared);
      cutlass::arch::fence_barrier_init();
      shared.start = start;
      shared.total = Wide::Walk::count_steps(params, work);
    }
  }
  __syncthreads();

  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<kBackwardProducerRegisters>();
    if (__shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0) == 0) load_steps<Wide>(params, shared, work);
  } else {
    cutlass::arch::warpgroup_reg_alloc<kBackwardConsumerRegisters>();
    const int consumer = warpgroup - 1;
    typename Wide::KeyMma key_mma;
    using Shape = cute::Shape<cute::Int<Wide::kKeys>, cute::Int<Wide::kHeadDim>>;
    auto dk = cute::partition_fragment_C(key_mma, Shape{});
    auto dv = cute::partition_fragment_C(key_mma, Shape{});
    Wide::compute(params, shared, work, consumer, dk, dv);

    // The queries' stages are free once both warpgroups are done.
    cutlass::arch::NamedBarrier::sync(kBackwardConsumers * 128, kBackwardConsumersMeet);
    const int warp = thread_index() / 32 - 4;
    using Staged = StagedRows<Wide::kColumns>;
    static_assert(kBackwardWarps * sizeof(Staged) <= sizeof(shared.q));
    Staged& staged = reinterpret_cast<Staged*>(shared.q)[warp];
    const auto store = [&](TensorView target, const auto& gradient, float factor) {
      target.data = static_cast<T*>(target.data) + consumer * Wide::kColumns;
      staged.template store<T>(params.key_documents, work.tile, target, work.key_head, Wide::kColumns,
                               work.key_start + warp % 4 * 16, gradient, {factor, factor});
    };
    store(params.dv, dv, 1.0f);
    store(params.dk, dk, params.scale);
  }
}

}  // namespace lemo::cuda::attention::sm90
