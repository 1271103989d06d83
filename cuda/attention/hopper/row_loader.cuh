// A tile of kRows packed rows of one document into shared memory, by one producer warp.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "cuda/attention/tile.cuh"
#include "row_tensor.h"

namespace lemo::cuda::attention::hopper {

// Shared memory holds kHeadDim / kBoxColumns slabs of [kRows, kBoxColumns] elements, each swizzled: CuTe's K-major
// SW128 (or SW64) atoms, rows first. Rows beyond the document are zeros, whatever storage holds there, so that a masked
// probability of 0 never meets a NaN.
template <int kRows, int kHeadDim>
class RowLoader {
 public:
  static constexpr int kColumns = kBoxColumns<kHeadDim>;
  static constexpr int kSlabs = kHeadDim / kColumns;
  static constexpr int kRuns = kRows / kRunRows;
  static constexpr uint32_t kBytes = kRows * kHeadDim * 2;
  static_assert(kHeadDim % kColumns == 0 && kRows % kRunRows == 0);

  // Finds where rows [position, position + kRows) of the document lie. By all lanes. In two steps, so that a caller can
  // have the row map's entries on their way while it waits for something else.
  __device__ __forceinline__ void fetch(const Documents& documents, const Tile& tile, int position) {
    const int lane = thread_index() % 32;
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = position + run * kRunRows + half * 32 + lane;
        rows_[run][half] = row < tile.length ? static_cast<int>(storage_row(documents, tile.start + row)) : -1;
      }
    }
  }
  __device__ __forceinline__ void resolve() {
    const int lane = thread_index() % 32;
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const int first = __shfl_sync(0xffffffffu, rows_[run][0], 0);
      const bool mine = rows_[run][0] == first + lane && rows_[run][1] == first + 32 + lane;
      // A box that begins at -kRunRows lies outside of the tensor whole: zeros.
      starts_[run] = first < 0 ? -kRunRows : __all_sync(0xffffffffu, mine) ? first : -1;
    }
  }
  __device__ __forceinline__ void find(const Documents& documents, const Tile& tile, int position) {
    fetch(documents, tile, position);
    resolve();
  }

  // Starts the copy; kBytes arrive at `barrier`, which expects them. By all lanes.
  __device__ __forceinline__ void load(const RowTensor& tensor, int head, uint64_t* barrier, void* target) const {
    constexpr uint64_t kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
    const int lane = thread_index() % 32;
    char* base = static_cast<char*>(target);
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      if (starts_[run] != -1) {
        if (lane < kSlabs) {
          cute::SM90_TMA_LOAD_3D::copy(&tensor.run, barrier, kHint,
                                       base + (lane * kRows + run * kRunRows) * kColumns * 2, lane * kColumns, head,
                                       starts_[run]);
        }
      } else if constexpr (kColumns == 32) {
        copy_rows(tensor, head, barrier, base, run);
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int slab = 0; slab < kSlabs; ++slab) {
            cute::SM90_TMA_LOAD_3D::copy(&tensor.row, barrier, kHint,
                                         base + (slab * kRows + run * kRunRows + half * 32 + lane) * kColumns * 2,
                                         slab * kColumns, head, rows_[run][half]);
          }
        }
      }
    }
  }

 private:
  // TMA writes to multiples of 128 bytes; a row of 32 columns has 64. Such rows go through registers.
  __device__ __forceinline__ void copy_rows(const RowTensor& tensor, int head, uint64_t* barrier, char* base,
                                            int run) const {
    const int lane = thread_index() % 32;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const int row = run * kRunRows + half * 32 + lane, storage = half == 0 ? rows_[run][0] : rows_[run][1];
      const uint16_t* from = head_pointer<uint16_t>(tensor.source, head) + storage * tensor.source.row_stride;
#pragma unroll 1
      for (int chunk = 0; chunk < kHeadDim / 8; ++chunk) {
        uint4 data = make_uint4(0, 0, 0, 0);
        if (storage >= 0 && chunk * 8 < tensor.head_dim) data = *reinterpret_cast<const uint4*>(from + chunk * 8);
        const int offset = (chunk / 4 * kRows + row) * 64 + chunk % 4 * 16;
        *reinterpret_cast<uint4*>(base + (offset ^ (offset >> 3 & 0x30))) = data;
      }
    }
    asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
    __syncwarp();
    if (lane == 0) {
      __threadfence_block();
      asm volatile("mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)),
                   "r"(kRunRows * kHeadDim * 2)
                   : "memory");
    }
  }

  int starts_[kRuns];   // storage row of a whole run; -1: row by row
  int rows_[kRuns][2];  // this lane's rows of a run; -1 beyond the document
};

}  // namespace lemo::cuda::attention::hopper
