// The tile table of the sm_90a backward kernel: one row per head_dim, each with its reason.
//
// What limits a choice: a consumer warpgroup (240 registers a thread) owns 64 keys and holds their dK and dV, plus S,
// dP (of 64 queries at a time) and its part of dQ for one query tile. 227 KiB of shared memory hold K, V, the rings of
// Q and dO, two buffers of dS and one of dQ.
#pragma once

#include <cstdint>

namespace lemo::cuda::attention::sm90 {

constexpr int kBackwardKeys = 128;  // per thread block: two consumer warpgroups
constexpr int kBackwardConsumers = 2;
constexpr int kBackwardWarps = kBackwardConsumers * 4;
constexpr uint32_t kBackwardProducerRegisters = 24;
constexpr uint32_t kBackwardConsumerRegisters = 240;

struct BackwardTile {
  int queries;       // per step
  int query_stages;  // the next step's scores start before this step's queries are released
  int dout_stages;
  bool late_keys;    // dK of a step runs behind the exponentials of the next one; needs the registers of one more dS
  bool held_values;  // V stays in registers, as the operand of dP: less is read from shared memory
};

// By padded head_dim (common/sm90/padded_head_dim.h).
template <int kHeadDim>
constexpr BackwardTile kBackwardTile = {};
#ifdef LEMO_TUNE_BACKWARD
template <>
constexpr BackwardTile kBackwardTile<64> = {LEMO_TUNE_BACKWARD};
template <>
constexpr BackwardTile kBackwardTile<96> = {LEMO_TUNE_BACKWARD};
template <>
constexpr BackwardTile kBackwardTile<128> = {LEMO_TUNE_BACKWARD};
#else
template <>  // dK and dV take only 64 registers: twice the queries halve what a product reads from shared memory
constexpr BackwardTile kBackwardTile<64> = {128, 3, 2, true, true};
template <>  // as 128, with registers to spare: DqOrder holds 128 queries at head_dim 64 only
constexpr BackwardTile kBackwardTile<96> = {64, 3, 2, true, false};
template <>  // dK + dV + S + dP = 192 registers of 240
constexpr BackwardTile kBackwardTile<128> = {64, 3, 2, true, false};
#endif
template <>  // a kernel of its shape (backward_wide.cuh): K, V, two stages of Q and dO, two buffers of P and dS
constexpr BackwardTile kBackwardTile<256> = {64, 2, 2, false, false};

}  // namespace lemo::cuda::attention::sm90
