// How the sm_90a kernels read [rows, heads, head_dim] tensors through TMA: boxes of kRunRows rows when storage rows are
// consecutive (packed tensors, blocks of 64 tokens and more), boxes of one row otherwise.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/documents.h"

namespace lemo::cuda::sm90 {

constexpr int kRunRows = 64;

// Columns of a box: one swizzle span of shared memory, which is 128 bytes, or 64 bytes if head_dim is not a multiple of
// 64.
template <int kHeadDim>
constexpr int kBoxColumns = kHeadDim % 64 == 0 ? 64 : 32;

struct RowTensor {
  CUtensorMap run;  // box [kRunRows, 1, box_columns] of [rows, heads, head_dim]
  CUtensorMap row;  // box [1, 1, box_columns]; not used with 32 columns, whose rows TMA cannot address one by one
  TensorView view;
  int head_dim;
};

// Columns from head_dim up to the next multiple of box_columns read as zeros. Throws LEMO_BACKEND_ERROR if the driver
// refuses.
RowTensor make_row_tensor(const TensorView& view, int64_t storage_rows, int heads, int head_dim, int box_columns,
                          int32_t dtype);

}  // namespace lemo::cuda::sm90
