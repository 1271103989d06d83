// Parameters of the sm_90a scores kernel, and how its work is divided.
#pragma once

#include "common/sm90/row_tensor.h"
#include "scores/params.h"

namespace lemo::cuda::scoring::sm90 {

using namespace cuda::sm90;  // common/sm90

// A thread block walks tiles of 128 queries against one unit of 256 keys. Twice as many keys as queries because the
// query heads of a group share their keys: with groups of 4, a step asks the L2 cache for 40 % less per operation than
// a tile of 128 x 128 would. The sums over heads take 128 registers per thread, the scores of one head against half of
// the keys 64.
constexpr int kQueries = 128, kKeys = 256;

// Neighboring units whose walks run side by side, so that they find the same queries in the L2 cache.
constexpr int kSide = 8;

// A unit holds whole blocks, and the 16 query rows of a warp lie in one block.
inline bool supported(int block_size, float scale) {
  return block_size >= 16 && kQueries % block_size == 0 && scale > 0.0f;
}

// As key_unit_slots, for this kernel's units.
inline int64_t unit_slots(int64_t blocks, int64_t documents, int block_size) {
  return blocks / (kKeys / block_size) + documents;
}

// As split_count. Documents of average length have a query tile for every split; empty walks are skipped, but cost a
// fetch each.
inline int split_count(int64_t blocks, int64_t documents, int block_size) {
  constexpr int64_t kFewest = 16;
  const int64_t tiles = blocks * block_size / documents / kQueries;
  const int64_t most = tiles > kFewest ? tiles : kFewest;
  const int64_t splits = scoring::split_count(unit_slots(blocks, documents, block_size));
  return static_cast<int>(splits < most ? splits : most);
}

struct KernelParams {
  RowTensor q, k;
  Params base;   // counter: zero at the start; items handed out in addition to every thread block's first
  float factor;  // scale / heads, applied to the maximum of the sums
  int items;     // walks: kSide slots, then splits, then groups of slots
};

}  // namespace lemo::cuda::scoring::sm90
