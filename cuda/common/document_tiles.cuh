// Tiles of packed rows: which rows of which document a thread block works on, and where they lie in storage.
#pragma once

#include "common/documents.h"

namespace lemo::cuda {

// A tile of `size` packed rows inside one document.
struct Tile {
  int start;   // first packed row of the document
  int length;  // rows of the document
  int index;   // tile of the document
  int count;   // tiles of the document
};

// Tiles of all documents in one grid dimension, without a scan on the host: document d begins at slot
// floor(cu_seqlens[d] / size) + d, which leaves room for its partial last tile. A slot may be empty (index >= count).
__device__ __forceinline__ Tile locate_tile(const Documents& documents, int size, int slot) {
  int low = 0, high = documents.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (documents.cu_seqlens[middle] / size + middle <= slot) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int start = documents.cu_seqlens[low];
  const int length = documents.cu_seqlens[low + 1] - start;
  return {start, length, slot - (start / size + low), (length + size - 1) / size};
}

// The grid for tiles of every head: slots for any division of at most `capacity` rows into documents, heads fastest.
// All heads' heaviest tiles then start first, which evens out the end of the launch.
inline unsigned tile_grid(const Documents& documents, int size, int heads) {
  return static_cast<unsigned>((documents.capacity / size + documents.count) * heads);
}

template <typename T>
__device__ __forceinline__ T* head_pointer(const TensorView& tensor, int head) {
  return static_cast<T*>(tensor.data) + head * tensor.head_stride;
}

__device__ __forceinline__ int64_t storage_row(const Documents& documents, int packed_row) {
  return documents.rows != nullptr ? documents.rows[packed_row] : packed_row;
}

}  // namespace lemo::cuda
