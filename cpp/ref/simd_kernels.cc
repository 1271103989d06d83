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

// Sums keep 16 partial sums whatever the machine: this many vectors.
constexpr int kParts = 16 / kWidth;

typedef float Vector __attribute__((vector_size(kWidth * sizeof(float)), aligned(4), may_alias));
typedef int32_t Bits __attribute__((vector_size(kWidth * sizeof(float)), aligned(4), may_alias));

inline Vector load(const float* p) { return *reinterpret_cast<const Vector*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<Vector*>(p) = v; }

// Adds up 16 partial sums in a fixed tree.
inline float reduce(const Vector (&v)[kParts]) {
  float s[16];
  for (int part = 0; part < kParts; ++part) store(s + part * kWidth, v[part]);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) s[i] += s[i + half];
  }
  return s[0];
}

// The last n < 16 elements with the others set to `fill`.
struct Tail {
  Tail(const float* p, int64_t n, float fill) {
    for (int64_t i = 0; i < 16; ++i) values[i] = i < n ? p[i] : fill;
  }
  float values[16];
};

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

// One instance of `micro` for each possible number of remaining rows.
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
  Vector total[kParts] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int part = 0; part < kParts; ++part) total[part] += load(a + i + part * kWidth) * load(b + i + part * kWidth);
  }
  if (i < n) {
    const Tail x(a + i, n - i, 0), y(b + i, n - i, 0);
    for (int part = 0; part < kParts; ++part)
      total[part] += load(x.values + part * kWidth) * load(y.values + part * kWidth);
  }
  return reduce(total);
}

float sum(int64_t n, const float* a) {
  Vector total[kParts] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int part = 0; part < kParts; ++part) total[part] += load(a + i + part * kWidth);
  }
  if (i < n) {
    const Tail x(a + i, n - i, 0);
    for (int part = 0; part < kParts; ++part) total[part] += load(x.values + part * kWidth);
  }
  return reduce(total);
}

float max(int64_t n, const float* a) {
  const float lowest = -__builtin_inff();
  Vector best = lowest - Vector{};
  Vector poison = {};  // NaN if an element was NaN: comparisons alone would lose it
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const Vector v = load(a + i);
    best = v > best ? v : best;
    poison = v != v ? v : poison;
  }
  float result = lowest;
  for (; i < n; ++i) {
    if (a[i] != a[i]) return a[i];
    result = a[i] > result ? a[i] : result;
  }
  for (int lane = 0; lane < kWidth; ++lane) {
    if (poison[lane] != 0) return poison[lane];
    result = best[lane] > result ? best[lane] : result;
  }
  return result;
}

// exp by 2^n * e^r with |r| <= ln2 / 2 and the Taylor series to r^7 (error 5e-9, below half a unit in the last place).
inline Vector exponential(Vector x) {
  const Vector zero = {};
  const Vector too_low = x < -87.0f ? zero : zero + 1.0f;
  const Vector nan = x != x ? x : zero;
  x = x < -87.0f ? zero - 87.0f : x;
  x = x > 88.0f ? zero + 88.0f : x;
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vector n = (x * 1.44269504088896341f + round) - round;
  const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector y = r * (1.0f / 5040) + (1.0f / 720);
  y = y * r + (1.0f / 120);
  y = y * r + (1.0f / 24);
  y = y * r + (1.0f / 6);
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const Bits power = (__builtin_convertvector(n, Bits) + 127) << 23;
  return y * (Vector)power * too_low + nan;
}

float exp_sum(int64_t n, float* a, float scale, float shift) {
  Vector total[kParts] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int part = 0; part < kParts; ++part) {
      const Vector y = exponential(load(a + i + part * kWidth) * scale - shift);
      store(a + i + part * kWidth, y);
      total[part] += y;
    }
  }
  float rest = 0;
  if (i < n) {
    Tail x(a + i, n - i, 0);
    for (int part = 0; part < kParts; ++part) {
      store(x.values + part * kWidth, exponential(load(x.values + part * kWidth) * scale - shift));
    }
    for (int64_t lane = 0; lane < n - i; ++lane) {
      a[i + lane] = x.values[lane];
      rest += x.values[lane];
    }
  }
  return reduce(total) + rest;
}

void exp(int64_t n, float* a, float scale, float shift) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(a + i, exponential(load(a + i) * scale - shift));
  if (i == n) return;
  Tail x(a + i, n - i, 0);
  for (int part = 0; part < kParts; ++part) {
    store(x.values + part * kWidth, exponential(load(x.values + part * kWidth) * scale - shift));
  }
  for (int64_t lane = 0; lane < n - i; ++lane) a[i + lane] = x.values[lane];
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

// tanh by its odd polynomial (Cephes) up to 0.625, and by exp(-2 |x|) from there on; error below two units in the last
// place.
inline Vector hyperbolic_tangent(Vector x) {
  const Vector zero = {};
  const Vector size = x < 0.0f ? -x : x;
  const Vector e = exponential(size * -2.0f);
  const Vector large = (1.0f - e) / (1.0f + e);
  const Vector z = x * x;
  Vector y = z * -5.70498872745e-3f + 2.06390887954e-2f;
  y = y * z - 5.37397155531e-2f;
  y = y * z + 1.33314422036e-1f;
  y = y * z - 3.33332819422e-1f;
  y = y * z * x + x;
  const Vector nan = x != x ? x : zero;
  return (size < 0.625f ? y : x < 0.0f ? -large : large) + nan;
}

void softcap(int64_t n, float* a, float cap, float* slope) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t count = n - i < kWidth ? n - i : kWidth;
    float values[kWidth] = {};
    for (int64_t lane = 0; lane < count; ++lane) values[lane] = a[i + lane];
    const Vector t = hyperbolic_tangent(load(values) / cap);
    store(values, t * cap);
    for (int64_t lane = 0; lane < count; ++lane) a[i + lane] = values[lane];
    if (slope == nullptr) continue;
    store(values, 1.0f - t * t);
    for (int64_t lane = 0; lane < count; ++lane) slope[i + lane] = values[lane];
  }
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
    LEMO_TEXT(LEMO_SIMD), kRows,   matmul,      dot, sum, max, exp_sum, exp, multiply, add,
    softmax_backward,     softcap, add_positive};

}  // namespace lemo::ref
