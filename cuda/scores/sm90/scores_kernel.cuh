// The persistent scores kernel: thread blocks fetch walks (a unit of keys, every splits-th query tile that sees it)
// until none is left. A walk's column sums stay in its thread block, so that they are added in a fixed order.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include <algorithm>

#include "common/launch.h"
#include "scores/sm90/scores_mainloop.cuh"

namespace lemo::cuda::scoring::sm90 {

constexpr uint32_t kProducerRegisters = 24, kConsumerRegisters = 240;
constexpr int kMostMaxima = (kQueries / 16) * (kKeys / 16);  // of a tile, at the smallest block size

struct Walk {
  int document_block, block_end;  // blocks of the document
  int start, length;              // tokens of the document
  int block;                      // first key block
  int key_start;                  // first key, counted from the document's start
  int first, tiles;               // query tiles first, first + splits, ... below tiles
  int split;
  bool valid;  // false: a slot that rounding leaves empty; from the producer: the end
};

template <class Mainloop>
struct Shared {
  typename Mainloop::Shared mainloop;
  unsigned maxima[2][kMostMaxima];  // [query blocks, key blocks] of this tile and of the one before
  EmptyBarrier full, empty;
  Walk walk;  // passed from the producer to the consumers
};

__device__ __forceinline__ Walk decode(const KernelParams& params, int item) {
  const Params& base = params.base;
  const int group = item / (kSide * base.splits), rest = item - group * kSide * base.splits;
  const int slot = group * kSide + rest % kSide, per_unit = kKeys / base.block_size;
  int document = 0;
  for (int high = base.document_count - 1; document < high;) {
    const int middle = (document + high + 1) / 2;
    if (base.documents[middle] / per_unit + middle <= slot) {
      document = middle;
    } else {
      high = middle - 1;
    }
  }
  Walk walk;
  walk.document_block = base.documents[document];
  walk.block_end = base.documents[document + 1];
  const int unit = slot - (walk.document_block / per_unit + document);
  walk.block = walk.document_block + unit * per_unit;
  walk.valid = walk.block < walk.block_end;
  walk.start = base.offsets[walk.document_block];
  walk.length = base.offsets[walk.block_end] - walk.start;
  walk.key_start = unit * kKeys;
  walk.split = rest / kSide;
  // All units visit the tiles that are `split` modulo splits, so that neighbors read the same ones.
  const int diagonal = unit * (kKeys / kQueries);
  walk.first = diagonal + (walk.split + base.splits - diagonal % base.splits) % base.splits;
  walk.tiles = (walk.length + kQueries - 1) / kQueries;
  return walk;
}

// Raises the maxima of this warp's 16 rows in every key block. `limit`: the last key, counted from the unit's start,
// that a row sees; below 0 for rows beyond the document.
template <bool kMasked, int kElements>
__device__ __forceinline__ void reduce_blocks(const float (&sums)[2][kElements], const int (&limit)[2], int block_size,
                                              unsigned* maxima) {
  const int lane = thread_index() % 32;
  float maximum = 0.0f;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int n = 0; n < kElements / 4; ++n) {
      const int column = half * (kKeys / 2) + n * 8;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (!kMasked || column + j % 2 + lane % 4 * 2 <= limit[j / 2])
          maximum = max_nan(maximum, sums[half][n * 4 + j]);
      }
      if ((column + 8) % block_size == 0) {
        // Values are not negative, so their bits order like integers, with NaN above everything.
        const unsigned bits = __reduce_max_sync(0xffffffffu, __float_as_uint(maximum));
        if (lane == 0) atomicMax(maxima, bits);
        ++maxima;
        maximum = 0.0f;
      }
    }
  }
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__((kQueries / 64 + 1) * 128, 1)
    scores_kernel_sm90(const __grid_constant__ KernelParams params) {
  using Mainloop = Mainloop<T, kHeadDim>;
  constexpr int kConsumers = Mainloop::kConsumers;
  static_assert(kFirstTurn + kConsumers <= kScoresConsumersMeet);
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& shared = *reinterpret_cast<Shared<Mainloop>*>(raw);
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);

  if (threadIdx.x == 0) {
    shared.mainloop.queries.init(kConsumers * 4);
    shared.mainloop.keys.init(kConsumers * 4);
    shared.full.init(1);
    init_for_warps(shared.empty, kConsumers * 4);
    cutlass::arch::fence_barrier_init();
  }
  for (int i = threadIdx.x; i < 2 * kMostMaxima; i += (kConsumers + 1) * 128) shared.maxima[0][i] = 0;
  __syncthreads();

  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
    if (warp != 0) return;
    typename Mainloop::ProducerState state;
    const int lane = thread_index() % 32;
    const auto fetch = [&] {
      int item = 0;
      if (lane == 0) item = static_cast<int>(gridDim.x) + atomicAdd(params.base.counter, 1);
      return item;  // in lane 0
    };
    uint32_t phase = 1;
    int item = static_cast<int>(blockIdx.x);
    while (true) {
      Walk walk;
      walk.valid = false;
      int next = 0;
      for (; item < params.items; item = __shfl_sync(0xffffffffu, next, 0)) {
        next = fetch();
        walk = decode(params, item);
        if (walk.valid && walk.first < walk.tiles) break;
        if (walk.valid && walk.block + lane < min(walk.block + kKeys / params.base.block_size, walk.block_end)) {
          params.base.partial[static_cast<int64_t>(walk.split) * params.base.block_count + walk.block + lane] = 0.0f;
        }
        walk.valid = false;
      }
      shared.empty.wait(phase);
      phase ^= 1;
      if (lane == 0) {
        shared.walk = walk;
        shared.full.arrive();
      }
      if (!walk.valid) break;
#pragma unroll 1
      for (int tile = walk.first; tile < walk.tiles; tile += params.base.splits) {
        Mainloop::load(params, shared.mainloop, state, walk.start + tile * kQueries, walk.start + walk.key_start);
      }
      item = __shfl_sync(0xffffffffu, next, 0);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
    const int consumer = warpgroup - 1, thread = thread_index() - 128, lane = thread_index() % 32;
    const int block_size = params.base.block_size;
    const int key_blocks = kKeys / block_size, query_blocks = kQueries / block_size;
    typename Mainloop::ConsumerState state;
    uint32_t phase = 0;
    int buffer = 0;
    Turns<Mainloop::kConsumers>::start(consumer);
    while (true) {
      shared.full.wait(phase);
      phase ^= 1;
      const Walk walk = shared.walk;
      __syncwarp();
      arrive_as_warp(shared.empty);
      if (!walk.valid) break;
      const int column = walk.block + thread;  // this thread's key block, if any
      const bool owner = thread < key_blocks && column < walk.block_end;
      float column_sum = 0.0f;
      for (int tile = walk.first; tile < walk.tiles; tile += params.base.splits) {
        float sums[2][Mainloop::kHalfKeys / 2];
        const int query_start = tile * kQueries - walk.key_start;  // counted from the unit's start
        const bool both = query_start > 0;
        Mainloop::compute(params, shared.mainloop, state, both, consumer, sums);

        const int warp_row = consumer * 64 + warp % 4 * 16;
        unsigned* maxima = shared.maxima[buffer];
        if (query_start < kKeys || (tile + 1) * kQueries > walk.length) {
          int limit[2];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int row = warp_row + lane / 4 + r * 8;
            limit[r] = tile * kQueries + row < walk.length ? query_start + row : -1;
          }
          reduce_blocks<true>(sums, limit, block_size, maxima + warp_row / block_size * key_blocks);
        } else {
          reduce_blocks<false>(sums, {}, block_size, maxima + warp_row / block_size * key_blocks);
        }
        cutlass::arch::NamedBarrier::sync(kConsumers * 128, kScoresConsumersMeet);
        if (owner) {
          const int row_block = walk.document_block + tile * query_blocks;
          for (int m = 0; m < query_blocks && row_block + m < walk.block_end; ++m) {
            unsigned& bits = maxima[m * key_blocks + thread];
            const float value = __uint_as_float(bits) * params.factor;
            bits = 0;  // no other thread comes here before the next barrier
            column_sum += value;
            if (params.base.map != nullptr) params.base.map[(row_block + m) * params.base.map_stride + column] = value;
          }
        }
        buffer ^= 1;
      }
      if (owner) params.base.partial[static_cast<int64_t>(walk.split) * params.base.block_count + column] = column_sum;
    }
  }
}

template <typename T, int kHeadDim>
void run_scores(const Params& params, int32_t dtype, cudaStream_t stream) {
  const auto tensor = [&](const TensorView& view, int heads) {
    return make_row_tensor(view, params.tokens, heads, params.head_dim, kBoxColumns<kHeadDim>, dtype);
  };
  KernelParams kernel_params{};
  kernel_params.q = tensor(params.q, params.heads);
  kernel_params.k = tensor(params.k, params.heads / params.group);
  kernel_params.base = params;
  kernel_params.factor = params.scale / static_cast<float>(params.heads);
  const int64_t slots = unit_slots(params.block_count, params.document_count, params.block_size);
  kernel_params.items = static_cast<int>((slots + kSide - 1) / kSide * kSide * params.splits);
  check(cudaMemsetAsync(params.counter, 0, sizeof(int), stream), "scores");
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const int blocks = std::min(kernel_params.items, device_info(device).multiprocessors);
  launch("scores", scores_kernel_sm90<T, kHeadDim>, blocks, (kQueries / 64 + 1) * 128,
         static_cast<int>(sizeof(Shared<Mainloop<T, kHeadDim>>)), stream, kernel_params);
}

}  // namespace lemo::cuda::scoring::sm90
