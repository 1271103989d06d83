// Loads a tile of kRows packed rows of one document into shared memory, by one producer warp.
#pragma once

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "common/document_tiles.cuh"
#include "common/mma.cuh"
#include "common/sm90/row_tensor.h"

namespace lemo::cuda::sm90 {

// Where rows [position, position + kRows) of a document lie in storage.
template <int kRows>
struct RowRuns {
  static constexpr int kRuns = kRows / kRunRows;
  int position;
  bool consecutive;   // every run lies in consecutive storage rows, or entirely beyond the document
  int starts[kRuns];  // the storage row of a consecutive run
};

// Shared memory holds kHeadDim / kBoxColumns slabs of [kSlabRows, kBoxColumns] elements, each swizzled (CuTe's K-major
// SW128 or SW64 atoms, rows first); the target is the first row of the first slab. Rows that do not exist are zeros,
// whatever storage holds there, so that a masked probability of 0 never meets a NaN. With kCut, rows may begin after
// tile.first, otherwise at 0 or before.
//
// A producer warp gets few issue slots next to the consumers, and whatever it executes between a stage's release and
// its copy leaves the stage empty. The common case, consecutive runs, is therefore worked out before the wait and
// issued by one lane without a branch; the other case reads the row map again.
template <int kRows, int kHeadDim, int kSlabRows = kRows, bool kCut = false>
class RowLoader {
 public:
  using Runs = RowRuns<kRows>;
  static constexpr int kColumns = kBoxColumns<kHeadDim>;
  static constexpr int kSlabs = kHeadDim / kColumns;
  static constexpr uint32_t kBytes = kRows * kHeadDim * 2;
  static_assert(kHeadDim % kColumns == 0 && kRows % kRunRows == 0);

  __device__ __forceinline__ RowLoader(const Documents& documents, const Tile& tile)
      : documents_(documents), tile_(tile) {}

  // Everything here is called by all lanes of the warp. find is done in two steps, so that the row map's entries can be
  // in flight while the caller waits for something else.
  struct Pending {
    Runs runs;
    int row;  // in lanes 2 i and 2 i + 1: the first and last storage row of run i; -1 beyond the document
  };
  __device__ __forceinline__ Pending fetch(int position) const {
    Pending pending;
    pending.runs.position = position;
    pending.runs.consecutive = documents_.row_map == nullptr && position + kRows <= tile_.length && !is_cut(position);
    if (pending.runs.consecutive) {
#pragma unroll
      for (int run = 0; run < Runs::kRuns; ++run) pending.runs.starts[run] = tile_.start + position + run * kRunRows;
    } else {
      const int lane = thread_index() % 32;
      pending.row = fetch_row(position + lane / 2 % Runs::kRuns * kRunRows + lane % 2 * (kRunRows - 1));
    }
    return pending;
  }
  __device__ __forceinline__ Runs resolve(const Pending& pending) const {
    Runs runs = pending.runs;
    if (runs.consecutive) return runs;
    runs.consecutive = true;
#pragma unroll
    for (int run = 0; run < Runs::kRuns; ++run) {
      runs.starts[run] = start_of(__shfl_sync(0xffffffffu, pending.row, 2 * run),
                                  __shfl_sync(0xffffffffu, pending.row, 2 * run + 1), runs.position + run * kRunRows);
      if (runs.starts[run] == kScattered) runs.consecutive = false;
    }
    return runs;
  }
  __device__ __forceinline__ Runs find(int position) const { return resolve(fetch(position)); }

  // Starts the copy; kBytes arrive at `barrier`, which expects them.
  __device__ __forceinline__ void load(const Runs& runs, const RowTensor& tensor, int head, uint64_t* barrier,
                                       void* target) const {
    char* base = static_cast<char*>(target);
    if (!runs.consecutive) return load_by_rows(runs.position, tensor, head, barrier, base);
    if (cute::elect_one_sync()) {
#pragma unroll
      for (int run = 0; run < Runs::kRuns; ++run) copy_run(runs.starts[run], run, tensor, head, barrier, base);
    }
  }

 private:
  static constexpr uint64_t kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  static constexpr int kScattered = -1;

  // The storage row of row `position` of the document.
  __device__ __forceinline__ int fetch_row(int position) const {
    const int clamped = min(kCut ? max(position, tile_.first) : position, tile_.length - 1);
    const int inside = tile_.start + clamped;
    const int storage = documents_.row_map != nullptr ? documents_.row_map[inside] : inside;
    return position < tile_.length && !is_cut(position) ? storage : -1;
  }
  __device__ __forceinline__ bool is_cut(int position) const { return kCut && position < tile_.first; }
  // Where a run starts, from the ends of it: rows ascend, so if last - first = kRunRows - 1 the run is contiguous. A
  // box that starts at -kRunRows lies entirely outside the tensor and reads as zeros.
  __device__ __forceinline__ int start_of(int first, int last, int position) const {
    if (kCut && first < 0 && position < tile_.length && position + kRunRows > tile_.first) return kScattered;
    return first < 0 ? -kRunRows : last - first == kRunRows - 1 ? first : kScattered;
  }

  // Called by one lane.
  static __device__ __forceinline__ void copy_run(int start, int run, const RowTensor& tensor, int head,
                                                  uint64_t* barrier, char* base) {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      cute::SM90_TMA_LOAD_3D::copy(&tensor.run, barrier, kHint,
                                   base + (slab * kSlabRows + run * kRunRows) * kColumns * 2, slab * kColumns, head,
                                   start);
    }
  }

  __device__ __forceinline__ void load_by_rows(int position, const RowTensor& tensor, int head, uint64_t* barrier,
                                               char* base) const {
    const int lane = thread_index() % 32;
#pragma unroll 1
    for (int run = 0; run < Runs::kRuns; ++run) {
      const int low = fetch_row(position + run * kRunRows + lane),
                high = fetch_row(position + run * kRunRows + 32 + lane);
      const int start =
          start_of(__shfl_sync(0xffffffffu, low, 0), __shfl_sync(0xffffffffu, high, 31), position + run * kRunRows);
      if (start != kScattered) {
        if (cute::elect_one_sync()) copy_run(start, run, tensor, head, barrier, base);
        continue;
      }
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        const int row = run * kRunRows + half * 32 + lane, storage = half == 0 ? low : high;
        if constexpr (kColumns == 32) {
          copy_row(storage, row, tensor, head, base);
        } else {
#pragma unroll 1
          for (int slab = 0; slab < kSlabs; ++slab) {
            cute::SM90_TMA_LOAD_3D::copy(&tensor.row, barrier, kHint, base + (slab * kSlabRows + row) * kColumns * 2,
                                         slab * kColumns, head, storage);
          }
        }
      }
      if constexpr (kColumns == 32) {
        asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
        __syncwarp();
        if (lane == 0) {
          __threadfence_block();
          asm volatile("mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)),
                       "r"(kRunRows * kHeadDim * 2)
                       : "memory");
        }
      }
    }
    __syncwarp();
  }

  // TMA writes to multiples of 128 bytes; a row of 32 columns has 64. Such a row goes through registers.
  static __device__ __forceinline__ void copy_row(int storage, int row, const RowTensor& tensor, int head, char* base) {
    const uint16_t* from = head_pointer<uint16_t>(tensor.view, head) + storage * tensor.view.row_stride;
#pragma unroll 1
    for (int chunk = 0; chunk < kHeadDim / 8; ++chunk) {
      uint4 data = make_uint4(0, 0, 0, 0);
      if (storage >= 0 && chunk * 8 < tensor.head_dim) data = *reinterpret_cast<const uint4*>(from + chunk * 8);
      const int offset = (chunk / 4 * kSlabRows + row) * 64 + chunk % 4 * 16;
      *reinterpret_cast<uint4*>(base + (offset ^ (offset >> 3 & 0x30))) = data;
    }
  }

  const Documents& documents_;
  const Tile& tile_;
};

}  // namespace lemo::cuda::sm90
