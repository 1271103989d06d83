// Matrix products of any size on top of Simd::matmul: blocks of the operands are copied next to each other first.
#pragma once

#include <cstdint>

#include "lemo/types.h"
#include "ref/parallel.h"

namespace lemo::ref {

// Element (i, j) lies at data[i * row + j * column]; one of the strides is 1.
struct Matrix {
  const float* data;
  int64_t row;
  int64_t column;
};

inline Matrix matrix(const float* data, int64_t stride) { return {data, stride, 1}; }
inline Matrix transposed(const float* data, int64_t stride) { return {data, 1, stride}; }

// C[m, n] = (accumulate ? C : 0) + A[m, k] B[k, n], rows of C contiguous. On the caller's thread only.
void gemm_serial(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c, int64_t ldc, bool accumulate);

// The same on all threads of the call, with gemm_floats(m, n, k) or more floats for each worker.
void gemm(const lemo_exec& exec, const Scratch& scratch, int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c,
          int64_t ldc, bool accumulate);

// Grows with each of the sizes.
Size gemm_floats(int64_t m, int64_t n, int64_t k);

}  // namespace lemo::ref
