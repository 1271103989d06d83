// Rows that no tile holds, where queries and keys have rows of their own (aligned_rows.cuh).
#include "attention/params.h"
#include "common/document_tiles.cuh"
#include "common/launch.h"

namespace lemo::cuda::attention {
namespace {

constexpr int kWarps = 8;

// A warp per packed row.
__global__ void __launch_bounds__(kWarps * 32) blank_rows_kernel(const __grid_constant__ BlankRows params) {
  const int row = static_cast<int>(blockIdx.x * kWarps + threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const Documents& rows = params.rows;
  if (row >= rows.cu_seqlens[rows.count]) return;
  const int document = locate_document(rows, 1, 0, row);
  const int start = rows.cu_seqlens[document], count = rows.cu_seqlens[document + 1] - start;
  const int others = params.others.cu_seqlens[document + 1] - params.others.cu_seqlens[document];
  const int blank = params.keys ? (others == 0 ? count : 0) : count - others;
  if (row - start >= blank) return;
  const int64_t storage = storage_row(rows, row);
  const int chunks = params.head_dim / 8;
  for (int item = lane; item < params.heads * chunks; item += 32) {
    const int head = item / chunks, column = item % chunks * 8;
    for (const TensorView& tensor : params.tensors) {
      if (tensor.data == nullptr) continue;
      uint16_t* target = head_pointer<uint16_t>(tensor, head) + storage * tensor.row_stride + column;
      *reinterpret_cast<uint4*>(target) = make_uint4(0, 0, 0, 0);
    }
  }
  if (params.lse == nullptr) return;
  for (int head = lane; head < params.heads; head += 32) params.lse[head * params.lse_stride + row] = -INFINITY;
}

}  // namespace

void launch_blank_rows(const BlankRows& params, cudaStream_t stream) {
  if (params.rows.capacity <= 0) return;
  launch("attention", blank_rows_kernel, static_cast<unsigned>((params.rows.capacity + kWarps - 1) / kWarps),
         kWarps * 32, 0, stream, params);
}

}  // namespace lemo::cuda::attention
