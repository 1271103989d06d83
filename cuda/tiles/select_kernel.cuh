// The choice of tiles: one thread block per query tile finds the score at which a limit is reached, digit by digit.
// Counts and sums are integers, so that the result depends on no order.
#pragma once

#include "common/document_tiles.cuh"
#include "common/vector.cuh"
#include "tiles/params.h"

namespace lemo::cuda::tiling {

constexpr int kSelectThreads = 512;
constexpr int kSelectWarps = kSelectThreads / 32;
constexpr int kBins = 256;
constexpr uint64_t kNoLimit = UINT64_MAX;

struct SelectParams {
  const float* scores;
  int64_t scores_stride;
  const float* masses;  // the scores themselves if there are no others
  int64_t masses_stride;
  Documents documents;
  int64_t first_slot;
  int32_t most;  // tiles, however many there are
  double density;
  uint64_t mass;  // in units of 2^-40; kNoLimit: any
  int32_t first, local;
  int32_t* chosen;
  int64_t chosen_stride;
  int32_t words;
  float* covered;  // or null
};

// Integers in the order of the scores; 0 and -0 tie.
__device__ __forceinline__ uint32_t order_of(float score) {
  const uint32_t bits = __float_as_uint(isnan(score) ? -INFINITY : score + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// A mass in units of 2^-40, cut to [0, 1]; NaN is 0.
__device__ __forceinline__ uint64_t units_of(float mass) {
  return static_cast<uint64_t>(fminf(fmaxf(mass, 0.0f), 1.0f) * 0x1p40f);
}

struct SelectShared {
  int counts[kBins];
  unsigned sums_low[kBins], sums_high[kBins];
  uint64_t warp_sums[kSelectWarps];
  int warp_ties[2][kSelectWarps];
  // What find_bin leaves.
  int bin, count;  // bin -1: all of them fit
  int before;      // tiles and units in the bins above it
  uint64_t before_sum;
  int ties;  // what count_ties finds
};

// A 64-bit sum out of 32-bit operations, which shared memory has in hardware: every overflow of the lower half is
// carried by the addition that caused it, so that the halves do not depend on the order.
__device__ __forceinline__ void add_units(unsigned& low, unsigned& high, uint64_t units) {
  const unsigned part = static_cast<unsigned>(units), before = atomicAdd(&low, part);
  const unsigned carry = static_cast<unsigned>(units >> 32) + (before + part < before ? 1u : 0u);
  if (carry != 0) atomicAdd(&high, carry);
}

// Every thread gets the sum.
__device__ __forceinline__ uint64_t block_sum(uint64_t value, uint64_t* warp_sums) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kFullWarp, value, step);
  __syncthreads();  // the previous use of `warp_sums` is over
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0;
#pragma unroll
  for (int warp = 0; warp < kSelectWarps; ++warp) value += warp_sums[warp];
  return value;
}

// By one warp: the highest bin with which `wanted` tiles or `mass` units are reached.
__device__ __forceinline__ void find_bin(SelectShared& shared, int wanted, uint64_t mass) {
  constexpr int kLaneBins = kBins / 32;
  const int lane = threadIdx.x, highest = kBins - 1 - lane * kLaneBins;
  const auto sum_of = [&](int bin) {
    return static_cast<uint64_t>(shared.sums_high[bin]) << 32 | shared.sums_low[bin];
  };
  int count = 0;
  uint64_t sum = 0;
#pragma unroll
  for (int i = 0; i < kLaneBins; ++i) {
    count += shared.counts[highest - i];
    sum += sum_of(highest - i);
  }
  int before = count;
  uint64_t before_sum = sum;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kFullWarp, before, step);
    const uint64_t other_sum = __shfl_up_sync(kFullWarp, before_sum, step);
    if (lane >= step) before += other, before_sum += other_sum;
  }
  const unsigned reaching = __ballot_sync(kFullWarp, before >= wanted || before_sum >= mass);
  if (reaching == 0) {
    if (lane == 0) shared.bin = -1;
    return;
  }
  if (lane != __ffs(static_cast<int>(reaching)) - 1) return;
  before -= count;
  before_sum -= sum;
  for (int bin = highest;; --bin) {
    const int here = shared.counts[bin];
    const uint64_t here_sum = sum_of(bin);
    if (before + here >= wanted || before_sum + here_sum >= mass) {
      shared.bin = bin;
      shared.count = here;
      shared.before = before;
      shared.before_sum = before_sum;
      return;
    }
    before += here;
    before_sum += here_sum;
  }
}

// Tiles of equal scores: how many of them, from the nearest on, reach `wanted` tiles or `mass` units. By one warp.
__device__ __forceinline__ int count_ties(const float* scores, const float* masses, int begin, int end, uint32_t order,
                                          int wanted, uint64_t mass) {
  const int lane = threadIdx.x;
  int ties = 0;
  uint64_t sum = 0;
  for (int top = end - 1; top >= begin; top -= 32) {
    const int n = top - lane;
    const bool tie = n >= begin && order_of(scores[n]) == order;
    uint64_t through = tie ? units_of(masses[n]) : 0;  // of the ties up to this lane's
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint64_t other = __shfl_up_sync(kFullWarp, through, step);
      if (lane >= step) through += other;
    }
    const unsigned tied = __ballot_sync(kFullWarp, tie);
    const int rank = ties + __popc(tied & ((2u << lane) - 1));
    const unsigned reaching = __ballot_sync(kFullWarp, tie && (rank >= wanted || sum + through >= mass));
    if (reaching != 0) return __shfl_sync(kFullWarp, rank, __ffs(static_cast<int>(reaching)) - 1);
    ties += __popc(tied);
    sum += __shfl_sync(kFullWarp, through, 31);
  }
  return ties;
}

// What is chosen among the candidates: order >> shift above `threshold`, and the `ties` nearest of those equal to it.
struct Threshold {
  uint32_t value;
  int shift;
  int ties;
};

// The candidates are scores[begin] to scores[end - 1]. `wanted` and `mass` are what is left to reach; both are above 0.
__device__ __forceinline__ Threshold find_threshold(const float* scores, const float* masses, int begin, int end,
                                                    int wanted, uint64_t mass, SelectShared& shared) {
  const bool limited = mass != kNoLimit;
  uint32_t prefix = 0;
  for (int shift = 24;; shift -= 8) {
    if (threadIdx.x < kBins) {
      shared.counts[threadIdx.x] = 0;
      shared.sums_low[threadIdx.x] = shared.sums_high[threadIdx.x] = 0;
    }
    __syncthreads();
#pragma unroll 4
    for (int n = begin + static_cast<int>(threadIdx.x); n < end; n += kSelectThreads) {
      const uint32_t order = order_of(scores[n]);
      if (shift < 24 && order >> (shift + 8) != prefix) continue;
      const uint32_t bin = order >> shift & (kBins - 1);
      atomicAdd(&shared.counts[bin], 1);
      if (limited) add_units(shared.sums_low[bin], shared.sums_high[bin], units_of(masses[n]));
    }
    __syncthreads();
    if (threadIdx.x < 32) find_bin(shared, wanted, mass);
    __syncthreads();
    if (shared.bin < 0) return {0, 0, INT_MAX};
    prefix = prefix << 8 | static_cast<uint32_t>(shared.bin);
    wanted -= shared.before;
    if (limited) mass -= shared.before_sum;
    if (shared.count == 1) return {prefix, shift, 1};
    if (shift == 0) break;
  }
  // The tiles left have one score, but not one mass.
  if (!limited) return {prefix, 0, wanted};
  if (threadIdx.x < 32) {
    const int ties = count_ties(scores, masses, begin, end, prefix, wanted, mass);
    if (threadIdx.x == 0) shared.ties = ties;
  }
  __syncthreads();
  return {prefix, 0, shared.ties};
}

// The second bound keeps the assembler from aiming for 32 registers, with which the sm_80 kernel would spill.
__global__ void __launch_bounds__(kSelectThreads, 2) choose_tiles(const __grid_constant__ SelectParams params) {
  __shared__ SelectShared shared;
  const int strip_slot = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int64_t slot = params.first_slot + strip_slot;
  const Tile tile = locate_tile(params.documents, kTile, static_cast<int>(slot));
  int32_t* chosen = params.chosen + slot * params.chosen_stride;
  const bool empty = tile.index >= tile.count;
  const int own = empty ? 0 : tile.index, used = (own + 31) / 32;
  for (int word = used + thread; word < params.words; word += kSelectThreads) chosen[word] = 0;
  if (empty) {
    if (thread == 0 && params.covered != nullptr) params.covered[strip_slot] = 0.0f;
    return;
  }

  // Tiles before `begin` and from `end` on are always there; the query tile itself is one of them.
  const float* scores = params.scores + strip_slot * params.scores_stride;
  const float* masses = params.masses + strip_slot * params.masses_stride;
  const int begin = min(params.first, own), end = max(begin, own - min(params.local, own));
  const int count = begin + own - end + 1;
  const double share = floor(params.density * (own + 1) + 0.5);
  const int limit = min(params.most, static_cast<int>(share));
  uint64_t sum = 0;
  if (params.mass != kNoLimit) {
    for (int n = thread; n < begin; n += kSelectThreads) sum += units_of(masses[n]);
    for (int n = end + thread; n <= own; n += kSelectThreads) sum += units_of(masses[n]);
    sum = block_sum(sum, shared.warp_sums);
  }
  Threshold threshold{UINT32_MAX, 0, 0};
  if (begin < end && count < limit && sum < params.mass) {
    const uint64_t mass = params.mass == kNoLimit ? kNoLimit : params.mass - sum;
    threshold = find_threshold(scores, masses, begin, end, limit - count, mass, shared);
  }

  // Bits, from the nearest tile down, so that ties are counted in their order.
  const int warp = thread / 32, lane = thread % 32;
  int ties_above = 0;
  uint64_t covered = thread == 0 ? units_of(masses[own]) : 0;
  for (int top = used - 1, pass = 0; top >= 0; top -= kSelectWarps, pass ^= 1) {
    const int word = top - warp, n = word * 32 + lane;
    const bool exists = word >= 0 && n < own, forced = exists && (n < begin || n >= end);
    const uint32_t order = order_of(exists ? scores[n] : 0.0f) >> threshold.shift;
    const bool tie = exists && !forced && order == threshold.value && threshold.ties > 0;
    const unsigned tied = __ballot_sync(kFullWarp, tie);
    if (lane == 0) shared.warp_ties[pass][warp] = __popc(tied);
    __syncthreads();
    int rank = ties_above + __popc(lane == 31 ? 0u : tied >> (lane + 1));
#pragma unroll
    for (int w = 0; w < kSelectWarps; ++w) {
      const int ties = shared.warp_ties[pass][w];
      if (w < warp) rank += ties;
      ties_above += ties;
    }
    const bool above = exists && !forced && threshold.ties > 0 && order > threshold.value;
    const bool taken = forced || above || (tie && rank < threshold.ties);
    const unsigned bits = __ballot_sync(kFullWarp, taken);
    if (taken) covered += units_of(masses[n]);
    if (lane == 0 && word >= 0) chosen[word] = static_cast<int32_t>(bits);
  }
  if (params.covered == nullptr) return;
  covered = block_sum(covered, shared.warp_sums);
  if (thread == 0) params.covered[strip_slot] = static_cast<float>(static_cast<double>(covered) * 0x1p-40);
}

}  // namespace lemo::cuda::tiling
