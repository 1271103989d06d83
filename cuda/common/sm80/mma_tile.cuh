// Tiles of the mma.sync kernels: how rows reach shared memory, are multiplied, and are stored.
#pragma once

#include "common/document_tiles.cuh"
#include "common/mma.cuh"

namespace lemo::cuda::sm80 {

// Loads kRows rows of head_dim elements through the row map: eight neighboring lanes read one row. Row numbers are
// fetched separately, so that a caller can have them ready one tile ahead. kCut: rows may begin after tile.first.
template <typename T, int kRows, int kHeadDim, int kThreads, bool kCut = false>
class TileLoader {
 public:
  static constexpr int kPitch = kHeadDim + kPadding;
  static constexpr int kElements = kRows * kPitch;

  // Rows [position, position + kRows) of the document; those that do not exist become zeros.
  __device__ __forceinline__ void find_rows(const Documents& documents, const Tile& tile, int position) {
    const int thread = thread_index();
    const int lane = thread % 32;
    const int row = position + lane / kRowsPerWarp * kRowsPerPass + thread / 32 * kRowsPerWarp + lane % kRowsPerWarp;
    row_ = -1;
    if (lane < kPasses * kRowsPerWarp && row < tile.length && (!kCut || row >= tile.first)) {
      row_ = static_cast<int>(storage_row(documents, tile.start + row));
    }
  }

  __device__ __forceinline__ void load(uint32_t target, const T* source, int64_t row_stride) const {
    const int thread = thread_index();
    const int lane = thread % kLanes;
    const int first = thread / kLanes;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int index = __shfl_sync(0xffffffffu, row_, pass * kRowsPerWarp + thread % 32 / kLanes);
      const bool valid = index >= 0;
      const T* row = source + (valid ? index : 0) * row_stride;
      const uint32_t row_target = target + (first + pass * kRowsPerPass) * kPitch * 2;
#pragma unroll
      for (int chunk = 0; chunk < kChunks; chunk += kLanes) {
        if (kChunks % kLanes == 0 || chunk + lane < kChunks) {
          copy_async_16(row_target + (chunk + lane) * 16, row + (chunk + lane) * 8, valid);
        }
      }
    }
  }

 private:
  static constexpr int kLanes = 8;
  static constexpr int kRowsPerPass = kThreads / kLanes;
  static constexpr int kPasses = kRows / kRowsPerPass;
  static constexpr int kChunks = kHeadDim / 8;
  static constexpr int kRowsPerWarp = 32 / kLanes;
  static_assert(kRows % kRowsPerPass == 0 && kPasses * kRowsPerWarp <= 32);
  int row_;  // every lane holds one of the warp's rows; the others read it through shuffles
};

// acc (16 x kColumns) += A (16 x kDepth) B^T, both operands stored with contiguous depth: a_address and b_address carry
// this lane's offsets (rows first for A, columns first for B).
template <typename T, int kColumns, int kDepth, int kPitch>
__device__ __forceinline__ void multiply_rows(float (&acc)[kColumns / 8][4], uint32_t a_address, uint32_t b_address) {
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    uint32_t a[4];
    load_matrices(a, a_address + k * 32);
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      uint32_t b[4];
      load_matrices(b, b_address + (n * 16 * kPitch + k * 16) * 2);
      multiply<T>(acc[2 * n], a, b[0], b[1]);
      multiply<T>(acc[2 * n + 1], a, b[2], b[3]);
    }
  }
}

// acc (16 x kColumns) += round(c) (16 x kDepth) B, c in C layout, B stored with contiguous columns.
template <typename T, int kColumns, int kDepth, int kPitch>
__device__ __forceinline__ void multiply_fragments(float (&acc)[kColumns / 8][4], const float (&c)[kDepth / 8][4],
                                                   uint32_t b_address) {
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    uint32_t a[4];
    pack_fragment<T>(a, c[2 * k], c[2 * k + 1]);
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      uint32_t b[4];
      load_matrices_transposed(b, b_address + (k * 16 * kPitch + n * 16) * 2);
      multiply<T>(acc[2 * n], a, b[0], b[1]);
      multiply<T>(acc[2 * n + 1], a, b[2], b[3]);
    }
  }
}

template <int kTiles>
__device__ __forceinline__ void clear(float (&acc)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) acc[n][c] = 0.0f;
  }
}

// Writes two C-layout rows (row, row + 8 of a 16-row tile) of factor * acc, if they lie inside the document.
template <typename T, int kTiles>
__device__ __forceinline__ void store_rows(const Documents& documents, const Tile& tile, const TensorView& target,
                                           int head, int row, const float (&acc)[kTiles][4], float factor_top,
                                           float factor_bottom) {
  const int column = thread_index() % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int position = row + half * 8;
    if (position >= tile.length || position < tile.first) continue;
    const float factor = half == 0 ? factor_top : factor_bottom;
    T* out = head_pointer<T>(target, head) + storage_row(documents, tile.start + position) * target.row_stride + column;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      *reinterpret_cast<uint32_t*>(out + n * 8) = pack<T>(acc[n][2 * half] * factor, acc[n][2 * half + 1] * factor);
    }
  }
}

}  // namespace lemo::cuda::sm80
