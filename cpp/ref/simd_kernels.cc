// Compiled once per instruction set with LEMO_SIMD = generic, avx2 or avx512. Includes no standard template: a copy of
// one compiled for a wide instruction set could replace the portable one at link time.
#include <stdint.h>

#include "ref/simd.h"

#define LEMO_JOIN_(a, b) a##b
#define LEMO_JOIN(a, b) LEMO_JOIN_(a, b)
#define LEMO_TEXT_(a) #a
#define LEMO_TEXT(a) LEMO_TEXT_(a)

namespace lemo::ref {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16, kRows = 12, kVectors = 2;
#elif defined(__AVX2__)
constexpr int kWidth = 8, kRows = 6, kVectors = 2;
#else
constexpr int kWidth = 4, kRows = 4, kVectors = 2;
#endif

typedef float Vector __attribute__((vector_size(kWidth * sizeof(float)), aligned(4), may_alias));
// 16 lanes whatever the machine: the fixed order of sums.
typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Bits __attribute__((vector_size(64), aligned(4), may_alias));

inline Vector load(const float* p) { return *reinterpret_cast<const Vector*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<Vector*>(p) = v; }
inline Lanes load16(const float* p) { return *reinterpret_cast<const Lanes*>(p); }
inline void store16(float* p, const Lanes& v) { *reinterpret_cast<Lanes*>(p) = v; }

// The last n < 16 elements, the others set to `fill`.
inline Lanes load_tail(const float* p, int64_t n, float fill) {
  Lanes v;
  for (int64_t i = 0; i < 16; ++i) v[i] = i < n ? p[i] : fill;
  return v;
}
inline void store_tail(float* p, int64_t n, const Lanes& v) {
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}

inline float reduce(const Lanes& v) {
  float s[16];
  for (int i = 0; i < 16; ++i) s[i] = v[i];
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) s[i] += s[i + half];
  }
  return s[0];
}

template <int R, int N>
inline void micro(int64_t k, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb, float* c,
                  int64_t ldc, bool accumulate) {
  Vector sum[R][N];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < N; ++v) sum[r][v] = accumulate ? load(c + r * ldc + v * kWidth) : Vector{};
  }
  for (int64_t p = 0; p < k; ++p) {
    Vector row[N];
    for (int v = 0; v < N; ++v) row[v] = load(b + p * ldb + v * kWidth);
    for (int r = 0; r < R; ++r) {
      const float x = a[r * a_row + p * a_col];
      for (int v = 0; v < N; ++v) sum[r][v] += x * row[v];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < N; ++v) store(c + r * ldc + v * kWidth, sum[r][v]);
  }
}

// One instance of `micro` for each number of rows that may be left over.
template <int R, int N>
inline void micro_rest(int64_t rows, int64_t k, const float* a, int64_t a_row, int64_t a_col, const float* b,
                       int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  if constexpr (R > 0) {
    if (rows == R) {
      micro<R, N>(k, a, a_row, a_col, b, ldb, c, ldc, accumulate);
    } else {
      micro_rest<R - 1, N>(rows, k, a, a_row, a_col, b, ldb, c, ldc, accumulate);
    }
  }
}

template <int N>
inline void column(int64_t m, int64_t k, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb,
                   float* c, int64_t ldc, bool accumulate) {
  int64_t i = 0;
  for (; i + kRows <= m; i += kRows) {
    micro<kRows, N>(k, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, accumulate);
  }
  micro_rest<kRows - 1, N>(m - i, k, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, accumulate);
}

void matmul(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb,
            float* c, int64_t ldc, bool accumulate) {
  int64_t j = 0;
  for (; j + kVectors * kWidth <= n; j += kVectors * kWidth) {
    column<kVectors>(m, k, a, a_row, a_col, b + j, ldb, c + j, ldc, accumulate);
  }
  for (; j < n; j += kWidth) column<1>(m, k, a, a_row, a_col, b + j, ldb, c + j, ldc, accumulate);
}

float dot(int64_t n, const float* a, const float* b) {
  Lanes sum = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) sum += load16(a + i) * load16(b + i);
  if (i < n) sum += load_tail(a + i, n - i, 0) * load_tail(b + i, n - i, 0);
  return reduce(sum);
}

float sum(int64_t n, const float* a) {
  Lanes total = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) total += load16(a + i);
  if (i < n) total += load_tail(a + i, n - i, 0);
  return reduce(total);
}

float max(int64_t n, const float* a) {
  const float lowest = -__builtin_inff();
  Lanes best = lowest - Lanes{};
  Lanes poison = {};  // NaN where an element was NaN: comparisons alone would lose it
  int64_t i = 0;
  for (; i < n; i += 16) {
    const Lanes v = i + 16 <= n ? load16(a + i) : load_tail(a + i, n - i, lowest);
    best = v > best ? v : best;
    poison = v != v ? v : poison;
  }
  float result = lowest;
  for (int lane = 0; lane < 16; ++lane) {
    if (poison[lane] != 0) return poison[lane];
    result = best[lane] > result ? best[lane] : result;
  }
  return result;
}

// exp by 2^n * e^r with |r| <= ln2 / 2 and the Taylor series to r^7 (error 5e-9, below half a unit in the last place).
inline Lanes exponential(Lanes x) {
  const Lanes too_low = x < -87.0f ? Lanes{} : Lanes{} + 1.0f;
  const Lanes nan = x != x ? x : Lanes{};
  x = x < -87.0f ? Lanes{} - 87.0f : x;
  x = x > 88.0f ? Lanes{} + 88.0f : x;
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Lanes n = (x * 1.44269504088896341f + round) - round;
  const Lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Lanes y = r * (1.0f / 5040) + (1.0f / 720);
  y = y * r + (1.0f / 120);
  y = y * r + (1.0f / 24);
  y = y * r + (1.0f / 6);
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const Bits power = (__builtin_convertvector(n, Bits) + 127) << 23;
  return y * (Lanes)power * too_low + nan;
}

float exp_sum(int64_t n, float* a, float scale, float shift) {
  Lanes total = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const Lanes y = exponential(load16(a + i) * scale - shift);
    store16(a + i, y);
    total += y;
  }
  if (i < n) {
    const Lanes y = exponential(load_tail(a + i, n - i, 0) * scale - shift);
    store_tail(a + i, n - i, y);
    for (int64_t lane = 0; lane < n - i; ++lane) total[lane] += y[lane];
  }
  return reduce(total);
}

void exp(int64_t n, float* a, float scale, float shift) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store16(a + i, exponential(load16(a + i) * scale - shift));
  if (i < n) store_tail(a + i, n - i, exponential(load_tail(a + i, n - i, 0) * scale - shift));
}

void multiply(int64_t n, float* y, float scale) {
  for (int64_t i = 0; i < n; ++i) y[i] *= scale;
}

void add(int64_t n, float* y, const float* x, float scale) {
  for (int64_t i = 0; i < n; ++i) y[i] += x[i] * scale;
}

void softmax_backward(int64_t n, const float* p, const float* dp, float delta, float* ds) {
  for (int64_t i = 0; i < n; ++i) ds[i] = p[i] * (dp[i] - delta);
}

void add_positive(int64_t n, float* y, const float* x, float scale) {
  for (int64_t i = 0; i < n; ++i) {
    const float s = x[i] * scale;
    y[i] += s < 0 ? 0.0f : s;  // a NaN stays one
  }
}

}  // namespace

extern const Simd LEMO_JOIN(simd_, LEMO_SIMD);
const Simd LEMO_JOIN(simd_, LEMO_SIMD) = {
    LEMO_TEXT(LEMO_SIMD), kRows, matmul, dot, sum, max, exp_sum, exp, multiply, add, softmax_backward, add_positive};

}  // namespace lemo::ref
