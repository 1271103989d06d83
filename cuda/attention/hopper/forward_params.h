// What the Hopper forward kernel is told.
#pragma once

#include "cuda/attention/params.h"
#include "row_tensor.h"

namespace lemo::cuda::attention::hopper {

// Thread blocks fetch work items until none is left. Items are ordered by section of heads (whose keys and values share
// the L2 cache), then by query tile, heaviest first within a document, then by head.
struct ForwardSchedule {
  int* next;    // zero at the start: items handed out beyond the first one of every thread block
  int slots;    // query tiles of all documents, an upper bound (tile.cuh: locate_tile)
  int section;  // key heads per section
  int items;    // slots * key heads * WorkOrder::items
};

struct ForwardKernelParams {
  RowTensor q, k, v;
  Rows out;
  float* lse;
  int64_t lse_stride;
  Documents documents;
  TileLists lists;
  ForwardSchedule schedule;
  int heads;
  int group;
  int head_dim;
  float scale_log2;
};

}  // namespace lemo::cuda::attention::hopper
