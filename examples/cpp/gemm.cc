#include "gemm.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "parallel.h"

namespace trainer {
namespace {

// The micro-kernel keeps a kPanelA x kPanelB piece of C in registers: 12 of 16 with AVX2.
constexpr int64_t kPanelA = 6;
constexpr int64_t kPanelB = 16;

// A vector type of GCC and Clang, as wide as AVX2's registers: the sums stay in them. Plain loops over an array do not
// get that from every compiler, and are ten times slower where they do not.
constexpr int64_t kLanes = 8;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

// A tile of C is one piece of work. Its panels of A and B (96 and 192 KiB) stay in the second-level cache.
constexpr int64_t kTileRows = 96;
constexpr int64_t kTileColumns = 192;
constexpr int64_t kDepth = 256;

// Products smaller than this run on one thread: starting others would take longer.
constexpr int64_t kSerialWork = int64_t{1} << 22;

// Copies `lines` lines of `depth` elements into panels of kWidth lines, element by element of the depth, so that the
// micro-kernel reads memory in order. Missing lines of the last panel are zeros.
template <int64_t kWidth>
void pack(const float* from, int64_t line, int64_t step, int64_t lines, int64_t depth, float* to) {
  for (int64_t first = 0; first < lines; first += kWidth) {
    const int64_t width = std::min(kWidth, lines - first);
    const float* start = from + first * line;
    for (int64_t p = 0; p < depth; ++p, to += kWidth) {
      for (int64_t i = 0; i < width; ++i) to[i] = start[i * line + p * step];
      for (int64_t i = width; i < kWidth; ++i) to[i] = 0.0f;
    }
  }
}

// c [kPanelA, kPanelB] += a b; c has rows of kTileColumns.
void micro_kernel(const float* __restrict a, const float* __restrict b, int64_t depth, float* __restrict c) {
  Lanes low[kPanelA] = {};   // columns 0 to 7
  Lanes high[kPanelA] = {};  // columns 8 to 15
  for (int64_t p = 0; p < depth; ++p) {
    Lanes line[2];
    std::memcpy(line, b + p * kPanelB, sizeof line);
#pragma GCC unroll 6
    for (int64_t i = 0; i < kPanelA; ++i) {
      low[i] += a[p * kPanelA + i] * line[0];
      high[i] += a[p * kPanelA + i] * line[1];
    }
  }
#pragma GCC unroll 6
  for (int64_t i = 0; i < kPanelA; ++i) {
    for (int64_t j = 0; j < kLanes; ++j) {
      c[i * kTileColumns + j] += low[i][j];
      c[i * kTileColumns + kLanes + j] += high[i][j];
    }
  }
}

// One thread's memory: a tile of C and the panels it is made of.
struct Scratch {
  std::vector<float> a = std::vector<float>(kTileRows * kDepth);
  std::vector<float> b = std::vector<float>(kTileColumns * kDepth);
  std::vector<float> c = std::vector<float>(kTileRows * kTileColumns);
};

}  // namespace

void gemm(int threads, int64_t m, int64_t n, int64_t k, float alpha, Matrix a, Matrix b, float beta, float* c,
          int64_t ldc) {
  const int64_t across = (n + kTileColumns - 1) / kTileColumns;
  const int64_t tiles = (m + kTileRows - 1) / kTileRows * across;
  const auto tile = [&](int64_t index) {
    thread_local Scratch scratch;
    const int64_t i0 = index / across * kTileRows;
    const int64_t j0 = index % across * kTileColumns;
    const int64_t rows = std::min(kTileRows, m - i0);
    const int64_t columns = std::min(kTileColumns, n - j0);
    std::fill(scratch.c.begin(), scratch.c.end(), 0.0f);
    for (int64_t p0 = 0; p0 < k; p0 += kDepth) {
      const int64_t depth = std::min(kDepth, k - p0);
      pack<kPanelA>(a.data + i0 * a.row + p0 * a.column, a.row, a.column, rows, depth, scratch.a.data());
      pack<kPanelB>(b.data + j0 * b.column + p0 * b.row, b.column, b.row, columns, depth, scratch.b.data());
      for (int64_t j = 0; j < columns; j += kPanelB) {
        for (int64_t i = 0; i < rows; i += kPanelA) {
          micro_kernel(scratch.a.data() + i * depth, scratch.b.data() + j * depth, depth,
                       scratch.c.data() + i * kTileColumns + j);
        }
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      float* out = c + (i0 + i) * ldc + j0;
      const float* sum = scratch.c.data() + i * kTileColumns;
      for (int64_t j = 0; j < columns; ++j) out[j] = beta == 0.0f ? alpha * sum[j] : alpha * sum[j] + beta * out[j];
    }
  };
  parallel_for(m * n * k < kSerialWork ? 1 : threads, tiles, tile);
}

}  // namespace trainer
