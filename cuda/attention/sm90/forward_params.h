// Parameters of the sm_90a forward kernel.
#pragma once

#include "attention/params.h"
#include "common/sm90/row_tensor.h"

namespace lemo::cuda::attention::sm90 {

using namespace cuda::sm90;  // common/sm90

// Thread blocks fetch work items until none is left. Items are ordered by section of heads (whose keys and values share
// the L2 cache), then by query tile, heaviest first within a document, then by head.
struct ForwardSchedule {
  int* next;    // zero at the start: items handed out in addition to every thread block's first
  int slots;    // query tiles of all documents, an upper bound (aligned_rows.cuh: query_slots)
  int section;  // key heads per section
  int items;    // slots * key heads * WorkOrder::items
};

struct ForwardKernelParams {
  RowTensor q, k, v;
  TensorView out;
  float* lse;
  int64_t lse_stride;
  Documents documents;  // of queries
  Documents key_documents;
  TileLists lists;
  ForwardSchedule schedule;
  int heads;
  int group;
  int head_dim;
  float scale_log2;
  const int32_t* edges;  // with a window: of queries (window_edges.h)
  const float* sinks;    // of query heads; null: none, or added afterwards (sinks.cu)
  float tanh_factor;     // with a soft-cap c: 2 log2(e) scale / c (soft_cap.cuh); scale_log2 is then c log2(e)
};

}  // namespace lemo::cuda::attention::sm90
