// Tile lists transposed on the device (query_lists.cu).
#pragma once

#include "attention/params.h"

namespace lemo::cuda::attention::sm80 {

struct QueryListsParams {
  Documents documents;
  TileLists key_lists;  // the query tiles of each key tile
  int slots;
  // Out: the key tiles of each query tile.
  int32_t* offsets;  // [slots + 1]
  int32_t* tiles;    // as many as key_lists has
};

void launch_query_lists(const QueryListsParams& params, cudaStream_t stream);

}  // namespace lemo::cuda::attention::sm80
