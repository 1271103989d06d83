// Packing rows of attention heads into the tiles that the matrix kernel reads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ref/simd.h"

namespace lemo::ref {

constexpr int64_t kTile = 64;  // rows and columns of a tile of scores

// to [rows, padded]: row(i) points to `width` floats; zeros up to `padded`.
template <class Row>
void pack_rows(float* to, int64_t padded, int64_t rows, int64_t width, const Row& row) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* in = row(i);
    float* out = to + i * padded;
    std::copy(in, in + width, out);
    std::fill(out + width, out + padded, 0.0f);
  }
}

// to [width, kTile]: column i is row(i); zeros from column `rows` on.
template <class Row>
void pack_transposed(float* to, int64_t rows, int64_t width, const Row& row) {
  if (rows < kTile) std::fill(to, to + width * kTile, 0.0f);
  for (int64_t i = 0; i < rows; ++i) {
    const float* in = row(i);
    for (int64_t c = 0; c < width; ++c) to[c * kTile + i] = in[c];
  }
}

}  // namespace lemo::ref
