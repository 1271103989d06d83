// Small dense tiles in fp32: packing, products and exponentials on 16-wide vectors.
//
// Everything here is force-inlined, so that a caller compiled for AVX-512, AVX2 or the baseline gets code for that
// target (see LEMO_FOR_EACH_TARGET). GCC and Clang vector extensions: no intrinsics, any architecture.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define LEMO_INLINE inline __attribute__((always_inline))

namespace lemo::ref {

constexpr int kTile = 64;    // rows and columns of a score tile
constexpr int kVector = 16;  // floats per vector

typedef float Vector __attribute__((vector_size(4 * kVector)));
typedef int32_t IntVector __attribute__((vector_size(4 * kVector)));

LEMO_INLINE int round_up(int n) { return (n + kVector - 1) / kVector * kVector; }

LEMO_INLINE void load(Vector& v, const float* p) { std::memcpy(&v, p, sizeof(v)); }
LEMO_INLINE void store(float* p, const Vector& v) { std::memcpy(p, &v, sizeof(v)); }

template <int kRows>
LEMO_INLINE void matmul_rows(const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb, float* c,
                             int64_t ldc, int n, int k, bool accumulate) {
  for (int j = 0; j < n; j += kVector) {
    Vector sum[kRows];
    for (int r = 0; r < kRows; ++r) {
      sum[r] = Vector{};
      if (accumulate) load(sum[r], c + r * ldc + j);
    }
    for (int p = 0; p < k; ++p) {
      Vector bv;
      load(bv, b + p * ldb + j);
      for (int r = 0; r < kRows; ++r) sum[r] += a[r * a_row + p * a_col] * bv;
    }
    for (int r = 0; r < kRows; ++r) store(c + r * ldc + j, sum[r]);
  }
}

// C [m, n] = or += A [m, k] B [k, n]. A by any strides (so also transposed); rows of B and C contiguous, n a multiple
// of kVector. kRows: rows of C held in registers (8 where there are 32 vector registers, 4 elsewhere).
template <int kRows>
LEMO_INLINE void matmul(const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb, float* c,
                        int64_t ldc, int m, int n, int k, bool accumulate) {
  int i = 0;
  for (; i + kRows <= m; i += kRows) {
    matmul_rows<kRows>(a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, n, k, accumulate);
  }
  for (; i < m; ++i) matmul_rows<1>(a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, n, k, accumulate);
}

// exp(x) to about 2 ulp; 0 below -87.3, the largest finite power of two's neighbourhood above 88.
LEMO_INLINE void exp_vector(Vector& x) {
  const IntVector tiny = x < -87.3f;
  x = x > 88.0f ? Vector{} + 88.0f : x;
  x = tiny ? Vector{} : x;
  // x = n ln 2 + r, |r| <= ln 2 / 2; adding 1.5 * 2^23 rounds to the nearest integer.
  const Vector shifted = x * 1.44269504088896341f + 12582912.0f;
  const Vector n = shifted - 12582912.0f;
  const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const IntVector exponent = (__builtin_convertvector(n, IntVector) + 127) << 23;
  Vector power;
  std::memcpy(&power, &exponent, sizeof(power));
  x = tiny ? Vector{} : p * power;
}

// to [n, padded]: row i = scale * source row i (`row(i)` points to `width` floats), zeros beyond `width` and `rows`.
template <class Row>
LEMO_INLINE void pack_rows(float* to, int padded, int rows, int n, int width, float scale, const Row& row) {
  for (int i = 0; i < n; ++i) {
    float* out = to + static_cast<int64_t>(i) * padded;
    int c = 0;
    if (i < rows) {
      const float* in = row(i);
      for (; c < width; ++c) out[c] = scale * in[c];
    }
    for (; c < padded; ++c) out[c] = 0.0f;
  }
}

// to [padded, kTile]: column i = source row i, zeros beyond `width` and `rows`.
template <class Row>
LEMO_INLINE void pack_transposed(float* to, int padded, int rows, int width, const Row& row) {
  std::memset(to, 0, sizeof(float) * static_cast<size_t>(padded) * kTile);
  for (int i = 0; i < rows; ++i) {
    const float* in = row(i);
    for (int c = 0; c < width; ++c) to[static_cast<int64_t>(c) * kTile + i] = in[c];
  }
}

}  // namespace lemo::ref

// Defines `name(parameters)`, which runs `body<kRows>(arguments)` compiled for the best instruction set of the machine
// it runs on. One binary serves every machine.
#if defined(__x86_64__) && defined(__GNUC__)
#define LEMO_FOR_EACH_TARGET(name, body, parameters, arguments)                                                     \
  __attribute__((target("arch=x86-64-v4"))) void name##_v4 parameters { body<8> arguments; }                        \
  __attribute__((target("arch=x86-64-v3"))) void name##_v3 parameters { body<4> arguments; }                        \
  void name##_base parameters { body<4> arguments; }                                                                \
  void name parameters {                                                                                            \
    static const int level = __builtin_cpu_supports("x86-64-v4") ? 4 : __builtin_cpu_supports("x86-64-v3") ? 3 : 1; \
    if (level == 4) return name##_v4 arguments;                                                                     \
    if (level == 3) return name##_v3 arguments;                                                                     \
    return name##_base arguments;                                                                                   \
  }
#else
#define LEMO_FOR_EACH_TARGET(name, body, parameters, arguments) \
  void name parameters { body<4> arguments; }
#endif
