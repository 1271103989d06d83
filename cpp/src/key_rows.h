// The rows of attention's keys and values: those of the queries, or separate ones.
#pragma once

#include "lemo/attention.h"

namespace lemo {

struct KeyRows {
  lemo_tensor cu_seqlens;
  lemo_tensor rows;
  int64_t capacity;  // of packed key rows
  bool separate;
};

// From shapes alone, as workspace sizes need it. Args: of either pass.
template <class Args>
KeyRows key_rows(const Args& a) {
  const bool separate = a.cu_seqlens_k.ndim != 0;
  const lemo_tensor& rows = separate ? a.rows_k : a.rows;
  return {separate ? a.cu_seqlens_k : a.cu_seqlens, rows, rows.ndim != 0 ? rows.shape[0] : a.k.shape[0], separate};
}

}  // namespace lemo
