// Stores rows of results from accumulators to device memory.
#pragma once

#include <cute/tensor.hpp>

#include "common/document_tiles.cuh"
#include "common/mma.cuh"
#include "common/sm90/padded_head_dim.h"

namespace lemo::cuda::attention::sm90 {

using namespace cuda::sm90;  // common/sm90

// A consumer warp's 16 rows, staged between accumulators and 16-byte stores, at most 128 columns at a time.
template <int kHeadDim>
struct StagedRows {
  static constexpr int kColumns = kHeadDim > 128 ? 128 : kHeadDim;
  static constexpr int kUnrolled = kHeadDim > 128 ? 2 : kColumns / 16;  // where accumulators leave few registers
  static constexpr int kPitch = kColumns + kPadding;  // in elements: rows of a quarter-warp fall into different banks
  alignas(16) uint16_t data[16 * kPitch];

  // Rows row_start .. row_start + 15 of the document: factor[j / 2 % 2] * out, through shared memory.
  template <typename T, class Out>
  __device__ __forceinline__ void store(const Documents& documents, const Tile& tile, const TensorView& target,
                                        int head, int head_dim, int row_start, const Out& out,
                                        const float (&factor)[2]) {
    const int lane = thread_index() % 32;
    // One load serves all rows, and is in flight while they are staged.
    const int own_row = row_start + lane % 16;
    const bool exists = own_row < tile.length && own_row >= tile.first;
    const int own = exists ? static_cast<int>(storage_row(documents, tile.start + own_row)) : -1;
    const int chunks = kMayBePadded<kHeadDim> ? head_dim / 8 : kColumns / 8;
#pragma unroll
    for (int begin = 0; begin < kHeadDim; begin += kColumns) {
      __syncwarp();  // what was staged before has been read
#pragma unroll
      for (int j = 0; j < kColumns / 2; j += 2) {
        const int r = j / 2 % 2, i = begin / 2 + j;
        *reinterpret_cast<uint32_t*>(data + (lane / 4 + r * 8) * kPitch + j / 4 * 8 + lane % 4 * 2) =
            pack<T>(out(i) * factor[r], out(i + 1) * factor[r]);
      }
      __syncwarp();
#pragma unroll(kUnrolled)
      for (int pass = 0; pass < kColumns / 16; ++pass) {
        if (kMayBePadded<kHeadDim> && pass * 2 >= chunks) break;
        const int item = pass * 32 + lane, row = item / chunks, chunk = item % chunks;
        const int storage = __shfl_sync(0xffffffffu, own, row);
        if (storage >= 0) {
          T* to = head_pointer<T>(target, head) + storage * target.row_stride + begin + chunk * 8;
          *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(data + row * kPitch + chunk * 8);
        }
      }
    }
  }
};

}  // namespace lemo::cuda::attention::sm90
