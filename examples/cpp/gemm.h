// Single-precision matrix product for the CPU: cache blocks, packed panels, a micro-kernel the compiler vectorises.
#pragma once

#include <cstdint>

namespace trainer {

// Element (i, j) is data[i * row + j * column]: a transposed matrix has its strides exchanged.
struct Matrix {
  const float* data;
  int64_t row;
  int64_t column;
};

// c [m, n] (row-major, rows `ldc` apart) = alpha a [m, k] b [k, n] + beta c. beta = 0 does not read c.
void gemm(int threads, int64_t m, int64_t n, int64_t k, float alpha, Matrix a, Matrix b, float beta, float* c,
          int64_t ldc);

}  // namespace trainer
