// The inner loops, compiled once per instruction set (simd_kernels.cc) and selected on first use. Sums run in a fixed
// order whatever the vector width: AVX2 and AVX-512 give the same bits; without FMA results differ by rounding.
#pragma once

#include <cstdint>

namespace lemo::ref {

// Rows and columns of tiles are padded to this many floats (one cache line).
constexpr int64_t kLane = 16;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Simd {
  const char* name;
  int64_t tile_rows;  // rows the matrix kernel takes at once: a good multiple for `m`

  // C[m, n] = (accumulate ? C : 0) + A B, all float32. A's element (i, p) lies at a[i * a_row + p * a_col]; the rows of
  // B and C are contiguous; n is a multiple of kLane.
  void (*matmul)(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_row, int64_t a_col, const float* b,
                 int64_t ldb, float* c, int64_t ldc, bool accumulate);

  // The functions below take any n. Sums: 16 partial sums added in a fixed tree.
  float (*dot)(int64_t n, const float* a, const float* b);
  float (*sum)(int64_t n, const float* a);
  float (*max)(int64_t n, const float* a);  // -inf for n = 0; NaN if any element is NaN
  // a[i] = exp(scale * a[i] - shift); returns the sum. exp flushes to 0 below exp(-87).
  float (*exp_sum)(int64_t n, float* a, float scale, float shift);
  // a[i] = exp(scale * a[i] - shift), without the sum.
  void (*exp)(int64_t n, float* a, float scale, float shift);
  // y[i] = y[i] * scale
  void (*multiply)(int64_t n, float* y, float scale);
  // y[i] += x[i] * scale
  void (*add)(int64_t n, float* y, const float* x, float scale);
  // ds[i] = p[i] * (dp[i] - delta)
  void (*softmax_backward)(int64_t n, const float* p, const float* dp, float delta, float* ds);
  // a[i] = cap tanh(a[i] / cap); slope (optional): the derivative 1 - tanh(a[i] / cap)^2
  void (*softcap)(int64_t n, float* a, float cap, float* slope);
  // y[i] += max(x[i] * scale, 0); NaN stays NaN
  void (*add_positive)(int64_t n, float* y, const float* x, float scale);
};

const Simd& simd();

}  // namespace lemo::ref
