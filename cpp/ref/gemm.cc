#include "ref/gemm.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "ref/parallel.h"
#include "ref/simd.h"

namespace lemo::ref {
namespace {

// Blocks of A (rows x depth: 480 KiB) and B (depth x columns: 128 KiB) that stay in a core's second-level cache.
constexpr int64_t kBlockRows = 480;
constexpr int64_t kBlockColumns = 128;
constexpr int64_t kBlockDepth = 256;

// Copies block [rows, columns] at (i, j). The copy keeps the direction in which the source is contiguous.
Matrix copy_block(const Matrix& from, int64_t i, int64_t j, int64_t rows, int64_t columns, float* to) {
  const float* start = from.data + i * from.row + j * from.column;
  if (from.column == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(to + r * columns, start + r * from.row, static_cast<size_t>(columns) * sizeof(float));
    }
    return {to, columns, 1};
  }
  for (int64_t c = 0; c < columns; ++c) {
    std::memcpy(to + c * rows, start + c * from.column, static_cast<size_t>(rows) * sizeof(float));
  }
  return {to, 1, rows};
}

// Copies block [rows, columns] at (i, j) with contiguous rows of `width` floats, padded with zeros.
void copy_rows(const Matrix& from, int64_t i, int64_t j, int64_t rows, int64_t columns, int64_t width, float* to) {
  const float* start = from.data + i * from.row + j * from.column;
  if (from.column == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(to + r * width, start + r * from.row, static_cast<size_t>(columns) * sizeof(float));
      std::fill(to + r * width + columns, to + (r + 1) * width, 0.0f);
    }
    return;
  }
  // Exchanging rows and columns in squares, so that both sides stay within a few cache lines.
  for (int64_t r0 = 0; r0 < rows; r0 += kLane) {
    const int64_t r1 = std::min(rows, r0 + kLane);
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t r = r0; r < r1; ++r) to[r * width + c] = start[r * from.row + c * from.column];
    }
    for (int64_t r = r0; r < r1; ++r) std::fill(to + r * width + columns, to + (r + 1) * width, 0.0f);
  }
}

// Block (i, j) of C. `memory` holds gemm_floats(m, n, k).
void block(float* memory, int64_t i, int64_t j, int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c,
           int64_t ldc, bool accumulate) {
  const int64_t rows = std::min(kBlockRows, m - i);
  const int64_t columns = std::min(kBlockColumns, n - j);
  const int64_t width = round_up(columns, kLane);
  const bool padded = width != columns;
  const int64_t depth = std::min(kBlockDepth, k);
  float* a_copy = memory;
  float* b_copy = a_copy + rows * depth;
  float* out = padded ? b_copy + depth * width : c + i * ldc + j;
  const int64_t ldo = padded ? width : ldc;
  if (padded && accumulate) {
    std::fill_n(out, rows * width, 0.0f);
    for (int64_t r = 0; r < rows; ++r) std::copy_n(c + (i + r) * ldc + j, columns, out + r * width);
  }
  if (k == 0 && !accumulate) {
    for (int64_t r = 0; r < rows; ++r) std::fill_n(out + r * ldo, columns, 0.0f);
  }
  for (int64_t p = 0; p < k; p += kBlockDepth) {
    const int64_t part = std::min(kBlockDepth, k - p);
    poll();
    const Matrix left = copy_block(a, i, p, rows, part, a_copy);
    copy_rows(b, p, j, part, columns, width, b_copy);
    simd().matmul(rows, width, part, left.data, left.row, left.column, b_copy, width, out, ldo, accumulate || p > 0);
  }
  if (padded) {
    for (int64_t r = 0; r < rows; ++r) std::copy_n(out + r * width, columns, c + (i + r) * ldc + j);
  }
}

}  // namespace

void gemm_serial(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c, int64_t ldc, bool accumulate) {
  std::vector<float> buffer(static_cast<size_t>(gemm_floats(m, n, k).count("matrix product")));
  for (int64_t i = 0; i < m; i += kBlockRows) {
    for (int64_t j = 0; j < n; j += kBlockColumns) block(buffer.data(), i, j, m, n, k, a, b, c, ldc, accumulate);
  }
}

void gemm(const lemo_exec& exec, const Scratch& scratch, int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c,
          int64_t ldc, bool accumulate) {
  const int64_t rows = (m + kBlockRows - 1) / kBlockRows;
  const int64_t columns = (n + kBlockColumns - 1) / kBlockColumns;
  parallel_for(exec, rows * columns, [&](int64_t task, int worker) {
    block(scratch.of(worker), task % rows * kBlockRows, task / rows * kBlockColumns, m, n, k, a, b, c, ldc, accumulate);
  });
}

Size gemm_floats(int64_t m, int64_t n, int64_t k) {
  const int64_t rows = std::min(kBlockRows, m), depth = std::min(kBlockDepth, k);
  const int64_t width = round_up(std::min(kBlockColumns, n), kLane);
  return rows * depth + depth * width + rows * width;
}

}  // namespace lemo::ref
