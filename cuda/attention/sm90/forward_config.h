// The tile table of the sm_90a forward kernel: one row per head_dim, each with its reason. benchmarks/tune.py measures
// the alternatives (it overrides every row by defining LEMO_TUNE_FORWARD as queries, keys, stages, producer, consumer)
// and prints the row to commit.
//
// What limits a choice: 64 K registers (a consumer warpgroup holds 64 rows of S, P and O) and 227 KiB of shared memory.
#pragma once

#include <cstdint>

#include "attention/sm90/visits.h"
#include "lemo/attention.h"

namespace lemo::cuda::attention::sm90 {

struct ForwardTile {
  int queries;  // per thread block; 64 per consumer warpgroup
  int keys;     // per step
  int stages;   // of keys, and of values
  // Per thread, multiples of 8; 128 (producer + warpgroups * consumer) <= 65536.
  uint32_t producer_registers;
  uint32_t consumer_registers;
};

// By padded head_dim (common/sm90/padded_head_dim.h).
template <int kHeadDim>
constexpr ForwardTile kForwardTile = {};
#ifdef LEMO_TUNE_FORWARD
template <>
constexpr ForwardTile kForwardTile<64> = {LEMO_TUNE_FORWARD};
template <>
constexpr ForwardTile kForwardTile<96> = {LEMO_TUNE_FORWARD};
template <>
constexpr ForwardTile kForwardTile<128> = {LEMO_TUNE_FORWARD};
#else
template <>  // three warpgroups: O takes only 32 registers, and a key tile is shared by more queries
constexpr ForwardTile kForwardTile<64> = {192, 128, 3, 32, 160};
template <>  // the producer also copies ragged rows itself (row_loader.cuh), which takes registers
constexpr ForwardTile kForwardTile<96> = {128, 128, 2, 56, 224};
template <>  // S + P + O = 160 registers of 232; 192 KiB of operands + 34 KiB of staged output
constexpr ForwardTile kForwardTile<128> = {128, 128, 2, 40, 232};
#endif

// With tile lists, a query tile is the LEMO_TILE_ROWS = 128 rows that one list describes; a thread block takes it for
// as many heads as it has warpgroups (WorkOrder).
template <int kHeadDim>
constexpr ForwardTile kListedTile = {};
template <>
constexpr ForwardTile kListedTile<64> = {192, LEMO_TILE_ROWS, 3, 32, 160};
template <>
constexpr ForwardTile kListedTile<96> = {128, LEMO_TILE_ROWS, 2, 56, 224};
template <>
constexpr ForwardTile kListedTile<128> = {128, LEMO_TILE_ROWS, 2, 40, 232};

// With a window: tiles as high as wide, so that the parts of a query tile visit the same key tiles; and with a short
// window three parts would visit twice as many as each of them sees.
template <int kHeadDim>
constexpr ForwardTile kWindowTile = {};
template <>
constexpr ForwardTile kWindowTile<64> = {128, 128, 3, 40, 232};
template <>
constexpr ForwardTile kWindowTile<96> = {128, 128, 2, 56, 224};
template <>
constexpr ForwardTile kWindowTile<128> = {128, 128, 2, 40, 232};
template <>  // O takes 128 registers and Q 64 KiB: one stage of queries, half as many keys, half of the output staged
constexpr ForwardTile kWindowTile<256> = {128, 64, 2, 40, 232};

template <int kHeadDim, Visits kVisits>
constexpr ForwardTile kForwardShape = kVisits == Visits::kListed   ? kListedTile<kHeadDim>
                                      : kVisits == Visits::kWindow ? kWindowTile<kHeadDim>
                                                                   : kForwardTile<kHeadDim>;

}  // namespace lemo::cuda::attention::sm90
