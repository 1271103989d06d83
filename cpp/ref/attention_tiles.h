// Keys and values of attention as dense tiles: rows are collected from their offsets once and padded with zeros, so
// that the inner loops are plain matrix products.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "lemo/attention.h"
#include "ref/parallel.h"
#include "ref/simd.h"
#include "ref/view.h"

namespace lemo::ref {

constexpr int64_t kKeys = 64;     // key rows of a tile; divides LEMO_TILE_ROWS
constexpr int64_t kQueries = 96;  // query rows of a tile: a multiple of every Simd::tile_rows

// The packed rows of a document on one side, queries or keys.
struct Span {
  int64_t start;
  int64_t length;
};

struct Document {
  Span queries;
  Span keys;
  int64_t first_tile;  // its tiles of kKeys key rows

  // Query i sees the keys up to i + offset().
  int64_t offset() const { return keys.length - queries.length; }
};

struct Tile {
  int64_t document;
  int64_t index;  // within the document
};

struct Tiling {
  std::vector<Document> documents;
  std::vector<Tile> keys;     // by kKeys rows; position = first_tile + index
  std::vector<Tile> queries;  // by kQueries rows

  Tiling(const lemo_tensor& cu_seqlens, const lemo_tensor& cu_seqlens_k) {
    const int32_t *query_rows = ints(cu_seqlens), *key_rows = ints(cu_seqlens_k);
    for (int64_t d = 0; d + 1 < cu_seqlens.shape[0]; ++d) {
      const Span own = {query_rows[d], query_rows[d + 1] - query_rows[d]};
      const Span seen = {key_rows[d], key_rows[d + 1] - key_rows[d]};
      documents.push_back({own, seen, static_cast<int64_t>(keys.size())});
      for (int64_t i = 0; i * kKeys < seen.length; ++i) keys.push_back({d, i});
      for (int64_t i = 0; i * kQueries < own.length; ++i) queries.push_back({d, i});
    }
  }
};

// The most key tiles that `capacity` rows in `documents` documents can make.
inline int64_t max_key_tiles(int64_t capacity, int64_t documents) { return capacity / kKeys + documents; }

// The first key of its document that each query sees: the first one within its window.
class FirstKeys {
 public:
  template <class Args>
  FirstKeys(const Args& a, const std::vector<Document>& documents) {
    if (a.window <= 0) return;
    const bool separate = present(a.cu_seqlens_k), placed = present(a.places);
    const int32_t* places = placed ? ints(a.places) : ints(a.rows);
    const int32_t* places_k = separate ? ints(a.places_k) : places;
    const auto place = [](const int32_t* list, int64_t i) { return list == nullptr ? i : int64_t{list[i]}; };
    for (const Document& document : documents) {
      first_.resize(static_cast<size_t>(document.queries.start), 0);
      for (int64_t i = 0, j = 0; i < document.queries.length; ++i) {
        const int64_t hidden = place(places, document.queries.start + i) - a.window;  // the last place it does not see
        while (j < document.keys.length && place(places_k, document.keys.start + j) <= hidden) ++j;
        first_.push_back(static_cast<int32_t>(j));
      }
    }
  }
  // Of a packed query row. Ascends within a document.
  int64_t of(int64_t query) const { return first_.empty() ? 0 : first_[static_cast<size_t>(query)]; }

 private:
  std::vector<int32_t> first_;  // empty without a window
};

// What one tile of LEMO_TILE_ROWS rows sees of its document besides itself: the tiles of its list, or all without
// lists.
class TileList {
 public:
  TileList(const lemo_tensor& offsets, const lemo_tensor& tiles, const Document& document, int64_t document_index,
           int64_t tile)
      : tile_(tile), listed_(present(offsets)) {
    if (!listed_) return;
    const int64_t slot = document.queries.start / LEMO_TILE_ROWS + document_index + tile;
    begin_ = ints(tiles) + ints(offsets)[slot];
    end_ = ints(tiles) + ints(offsets)[slot + 1];
  }
  bool sees(int64_t other) const {
    return !listed_ || other == tile_ || std::binary_search(begin_, end_, static_cast<int32_t>(other));
  }

 private:
  int64_t tile_;
  bool listed_;
  const int32_t* begin_ = nullptr;
  const int32_t* end_ = nullptr;
};

// out[i, :] = scale * row i, out[i, d..width) = 0, for packed rows [first, first + count) of one head.
inline void collect_rows(const lemo_tensor& x, const int32_t* rows, int64_t head, int64_t first, int64_t count,
                         float scale, int64_t width, float* out) {
  const int64_t d = x.shape[2];
  for (int64_t i = 0; i < count; ++i) {
    const float* from = row(x, rows == nullptr ? first + i : rows[first + i], head);
    float* to = out + i * width;
    if (scale == 1.0f) {
      std::memcpy(to, from, static_cast<size_t>(d) * sizeof(float));
    } else {
      for (int64_t j = 0; j < d; ++j) to[j] = scale * from[j];
    }
    std::fill(to + d, to + width, 0.0f);
  }
}

// The same for one tile of keys, short tiles padded with zero rows: out is [kKeys, width].
inline void collect_tile(const lemo_tensor& x, const int32_t* rows, int64_t head, const Span& keys, int64_t tile,
                         int64_t width, float* out) {
  const int64_t count = std::min(kKeys, keys.length - tile * kKeys);
  collect_rows(x, rows, head, keys.start + tile * kKeys, count, 1.0f, width, out);
  std::fill(out + count * width, out + kKeys * width, 0.0f);
}

// One tile of keys with rows and columns exchanged: out is [D, kKeys].
inline void collect_transposed(const lemo_tensor& x, const int32_t* rows, int64_t head, const Span& keys, int64_t tile,
                               float* out) {
  const int64_t d = x.shape[2];
  const int64_t first = keys.start + tile * kKeys;
  const int64_t count = std::min(kKeys, keys.length - tile * kKeys);
  for (int64_t i = 0; i < kKeys; ++i) {
    if (i >= count) {
      for (int64_t j = 0; j < d; ++j) out[j * kKeys + i] = 0.0f;
      continue;
    }
    const float* from = row(x, rows == nullptr ? first + i : rows[first + i], head);
    for (int64_t j = 0; j < d; ++j) out[j * kKeys + i] = from[j];
  }
}

}  // namespace lemo::ref
