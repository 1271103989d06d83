// Tiles of packed rows: which rows of which document a thread block works on, and where they lie in storage.
#pragma once

#include "common/documents.h"

namespace lemo::cuda {

constexpr int kUncut = INT32_MIN;

// A tile of `size` packed rows inside one document.
struct Tile {
  int start;   // first packed row of the document
  int length;  // rows of the document
  int index;   // tile of the document
  int count;   // tiles of the document
  int first;   // rows before it do not exist; kUncut: every row up to `length` that is asked for does
};

// Tiles of all documents in one grid dimension, without a scan on the host: document d begins at slot
// floor(cu_seqlens[d] / size) + d * spare, which leaves room for its partial tiles.
__device__ __forceinline__ int locate_document(const Documents& documents, int size, int spare, int slot) {
  int low = 0, high = documents.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (documents.cu_seqlens[middle] / size + middle * spare <= slot) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// With one spare slot. It may be empty (index >= count).
__device__ __forceinline__ Tile locate_tile(const Documents& documents, int size, int slot) {
  const int document = locate_document(documents, size, 1, slot);
  const int start = documents.cu_seqlens[document];
  const int length = documents.cu_seqlens[document + 1] - start;
  return {start, length, slot - (start / size + document), (length + size - 1) / size, kUncut};
}

// Slots for any division of at most `capacity` rows into documents.
inline int64_t tile_slots(const Documents& documents, int size) { return documents.capacity / size + documents.count; }

template <typename T>
__device__ __forceinline__ T* head_pointer(const TensorView& tensor, int head) {
  return static_cast<T*>(tensor.data) + head * tensor.head_stride;
}

__device__ __forceinline__ int64_t storage_row(const Documents& documents, int packed_row) {
  return documents.row_map != nullptr ? documents.row_map[packed_row] : packed_row;
}

}  // namespace lemo::cuda
