// Tiles of documents and their slots (lemo/attention.h), and bits of a choice of tiles (lemo/tiles.h), in host memory.
#pragma once

#include <cstdint>

#include "lemo/attention.h"

namespace lemo {

struct TileSlot {
  int64_t slot;
  int64_t document;
  int64_t index;   // within the document
  int64_t start;   // first packed row of the document
  int64_t length;  // rows of the document
};

// Calls visitor(tile) for every tile of the documents, by ascending slot.
template <class Visitor>
void for_each_tile(const lemo_tensor& cu_seqlens, Visitor&& visitor) {
  const auto* starts = static_cast<const int32_t*>(cu_seqlens.data);
  for (int64_t d = 0; d + 1 < cu_seqlens.shape[0]; ++d) {
    const int64_t start = starts[d], length = starts[d + 1] - start;
    for (int64_t i = 0; i * LEMO_TILE_ROWS < length; ++i)
      visitor({start / LEMO_TILE_ROWS + d + i, d, i, start, length});
  }
}

// Calls visitor(n) for every bit n that is set, ascending.
template <class Visitor>
void for_each_bit(const int32_t* words, int64_t count, Visitor&& visitor) {
  for (int64_t w = 0; w < count; ++w) {
    for (auto rest = static_cast<uint32_t>(words[w]); rest != 0; rest &= rest - 1) {
      visitor(32 * w + __builtin_ctz(rest));
    }
  }
}

}  // namespace lemo
