// Which rows a tile visits with tile lists: those of its own tile and of the tiles in its list.
#pragma once

#include <climits>

#include "attention/params.h"
#include "common/document_tiles.cuh"
#include "lemo/attention.h"

namespace lemo::cuda::attention::sm80 {

// The keys of a query tile, numbered without gaps: first those of its list, then those of its own tile. In these
// numbers a query tile with a list is the last tile of a document, and sees all of it.
struct ListedKeys {
  const int32_t* tiles;
  int own, end;   // numbers of the own tile
  int own_shift;  // from them to rows

  ListedKeys() = default;
  // Of tile `index` of the document that the queries are in.
  __device__ __forceinline__ ListedKeys(const TileLists& lists, int slot, const Tile& queries, int index) {
    const int begin = lists.offsets[slot], own_row = index * LEMO_TILE_ROWS;
    tiles = lists.tiles + begin;
    own = (lists.offsets[slot + 1] - begin) * LEMO_TILE_ROWS;
    end = own + min(LEMO_TILE_ROWS, queries.length - own_row);
    own_shift = own_row - own;
  }

  __device__ __forceinline__ int row(int number) const {
    if (number >= own) return number + own_shift;
    return tiles[number / LEMO_TILE_ROWS] * LEMO_TILE_ROWS + number % LEMO_TILE_ROWS;
  }
};

// The queries of a key tile, kRows at a time.
template <int kRows>
struct ListedQueries {
  static_assert(LEMO_TILE_ROWS % kRows == 0);

  const int32_t* tiles;
  int begin, end;  // of the list

  ListedQueries() = default;
  __device__ __forceinline__ ListedQueries(const TileLists& lists, int slot)
      : tiles(lists.tiles), begin(lists.offsets[slot]), end(lists.offsets[slot + 1]) {}

  // What follows `row` in a walk that starts in the own tile and with entry = begin. Beyond the document at the end:
  // only its last tile can be partial, and no list goes on after that one.
  __device__ __forceinline__ int after(int row, int& entry) const {
    if (row % LEMO_TILE_ROWS != LEMO_TILE_ROWS - kRows) return row + kRows;
    return entry < end ? tiles[entry++] * LEMO_TILE_ROWS : INT_MAX;
  }
};

}  // namespace lemo::cuda::attention::sm80
