// What the producer warp of a backward thread block loads: its keys once, and a step at a time the queries that see
// them, with their statistics and the gradients of their outputs.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "attention/sm90/backward_walk.cuh"
#include "common/sm90/pipeline.cuh"
#include "common/sm90/row_loader.cuh"

namespace lemo::cuda::attention::sm90 {

// Called by one warp. Mainloop: shapes, loaders, and the walk over the steps of its thread block.
template <class Mainloop>
__device__ __forceinline__ void load_steps(const BackwardKernelParams& params, typename Mainloop::Shared& shared,
                                           const KeyWork& work) {
  using KeyLoader = typename Mainloop::KeyLoader;
  using QueryLoader = typename Mainloop::QueryLoader;
  constexpr int kQueries = Mainloop::kQueries, kTile = Mainloop::kTile;
  constexpr uint32_t kStatsBytes = 2 * kQueries * 4;
  {
    const KeyLoader loader(params.key_documents, work.tile);
    const auto runs = loader.find(work.key_start);
    if (cute::elect_one_sync()) shared.keys.arrive_and_expect_tx(2 * KeyLoader::kBytes);
    uint64_t* barrier = reinterpret_cast<uint64_t*>(&shared.keys);
    loader.load(runs, params.k, work.key_head, barrier, shared.k);
    loader.load(runs, params.v, work.key_head, barrier, shared.v);
  }
  auto query_state = Ring<Mainloop::kQueryStages>::producer_start();
  auto dout_state = Ring<Mainloop::kDoutStages>::producer_start();
  const Tile queries = work.queries();
  const QueryLoader loader(params.documents, queries);
  typename Mainloop::Walk walk = Mainloop::walk(params, shared, work);
  auto runs = loader.find(walk.query_tile * kQueries);
  walk.publish(params, work);
#pragma unroll 1
  while (walk.steps > 0) {
    const int head = work.key_head * params.group + walk.head();
    const int item = item_of(params, work, walk);
    shared.queries.wait_empty(query_state);
    uint64_t* barrier = shared.queries.expect(query_state, QueryLoader::kBytes + kStatsBytes, [&] {
      shared.steps[query_state.index()] = {walk.query_tile, item, walk.entry};
    });
    loader.load(runs, params.q, head, barrier, shared.q + query_state.index() * kTile);
    if (cute::elect_one_sync()) {
      cute::SM90_BULK_COPY_G2S::copy(params.stats + static_cast<int64_t>(item) * (2 * kQueries), barrier,
                                     shared.stats[query_state.index()], kStatsBytes);
    }
    ++query_state;
    barrier = shared.douts.acquire(dout_state, QueryLoader::kBytes);
    loader.load(runs, params.dout, head, barrier, shared.dout + dout_state.index() * kTile);
    ++dout_state;
    walk.advance();
    // After this step's loads, which would otherwise wait for it.
    if (walk.head_in_group == 0 && walk.steps > 0) {
      walk.publish(params, work);
      runs = loader.find(walk.query_tile * kQueries);
    }
  }
}

}  // namespace lemo::cuda::attention::sm90
