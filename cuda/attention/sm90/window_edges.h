// Where windows end, in rows: the passes then compare numbers of rows, and neither search places nor read them.
//
// Places ascend with rows, so that the keys near enough to a query are those from one row on, and the queries near
// enough to a key those before one row. Both are positions (aligned_rows.cuh).
#pragma once

#include "attention/params.h"

namespace lemo::cuda::attention::sm90 {

struct WindowEdges {
  Documents queries, keys;
  ScoreOptions options;
  bool of_keys;    // whose edges they are
  int32_t* edges;  // by packed row. Of a query: the first key near enough; of a key: the first query that is not
};

void launch_window_edges(const char* operation, const WindowEdges& params, cudaStream_t stream);

}  // namespace lemo::cuda::attention::sm90
