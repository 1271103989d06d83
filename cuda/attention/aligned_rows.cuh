// How the queries of a document line up with its keys, which may be other rows and another number of them.
//
// Both are numbered by positions of one axis on which a query sees the keys up to its own position. Queries and keys
// end together, at `length`; keys begin at -ahead, a multiple of the key tile, so that tiles cut the axis into squares
// along the diagonal whatever the sizes, as they do where queries and keys are the same rows. Queries begin at `first`,
// inside the first tile; or, where there are more queries than keys, before position 0: those see no key, belong to no
// tile, and are written by blank_rows.cu.
#pragma once

#include "attention/params.h"
#include "common/document_tiles.cuh"

namespace lemo::cuda::attention {

struct AlignedDocument {
  int length;       // the position after the last one; 0: no query sees a key
  int first;        // position of the first query, or kUncut
  int ahead;        // keys before position 0
  int query_start;  // packed rows of position 0; either may lie outside of the document
  int key_start;
};

// Without kSplit, queries and keys are the same rows.
template <int kAlignment, bool kSplit = true>
__device__ __forceinline__ AlignedDocument align_document(const Documents& queries, const Documents& keys,
                                                          int document) {
  const int query_start = queries.cu_seqlens[document], count = queries.cu_seqlens[document + 1] - query_start;
  if constexpr (!kSplit) return {count, kUncut, 0, query_start, query_start};
  const int key_start = keys.cu_seqlens[document];
  const int offset = keys.cu_seqlens[document + 1] - key_start - count;
  const int first = offset < 0 ? offset : offset % kAlignment;
  const int ahead = count > 0 ? offset - first : 0;
  return {count > 0 ? count + first : 0, max(first, 0), ahead, query_start - first, key_start + ahead};
}

// Slots of a document's query tiles besides those that its rows take (locate_document): the first tile may be cut.
template <int kAlignment>
__host__ __device__ constexpr int spare_slots(const Documents& queries, int size) {
  return 1 + (queries.aligned ? (kAlignment - 1 + size - 1) / size : 0);
}

// Slots for the query tiles of all documents and any division of the rows into documents.
template <int kAlignment>
inline int64_t query_slots(const Documents& queries, int size) {
  return queries.capacity / size + static_cast<int64_t>(queries.count) * spare_slots<kAlignment>(queries, size);
}

// A query tile in positions, and its document.
struct QueryTile {
  Tile tile;
  AlignedDocument document;
};

template <int kAlignment, bool kSplit = true>
__device__ __forceinline__ QueryTile locate_queries(const Documents& queries, const Documents& keys, int size,
                                                    int slot) {
  const int spare = kSplit ? spare_slots<kAlignment>(queries, size) : 1;
  const int index = locate_document(queries, size, spare, slot);
  const AlignedDocument document = align_document<kAlignment, kSplit>(queries, keys, index);
  const int tile = slot - (queries.cu_seqlens[index] / size + index * spare);
  return {{document.query_start, document.length, tile, (document.length + size - 1) / size, document.first}, document};
}

template <bool kFirst, class Value>
__device__ __forceinline__ const Value& choose(const Value& first, const Value& second) {
  if constexpr (kFirst) return first;
  return second;
}

// Both sides of a query tile counted from the first key in place of position 0, for kernels that walk from key 0: the
// query at position p is then row p + ahead.
struct FromFirstKey {
  Tile queries, keys;
};

__device__ __forceinline__ FromFirstKey count_from_first_key(const QueryTile& located) {
  const AlignedDocument& document = located.document;
  const int ahead = document.ahead, length = document.length + ahead;
  const Tile& tile = located.tile;
  return {{document.query_start - ahead, length, tile.index, tile.count,
           document.first == kUncut ? kUncut : document.first + ahead},
          {document.key_start - ahead, length, 0, 0, kUncut}};
}

}  // namespace lemo::cuda::attention
