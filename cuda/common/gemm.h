// Matrix products on tensor cores with fp32 accumulation, as the rest of the backend uses them. CUTLASS's own products
// are instantiated only under gemm/, in one file per architecture and dtype.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lemo::cuda {

// Storage of the operands, all row-major:
//   kNT  A [m, k], B [n, k], D [m, n] in the dtype of A
//   kNN  A [m, k], B [k, n], D [m, n] in the dtype of A
//   kTN  A [k, m], B [k, n], D [m, n] in float32
enum class GemmKind { kNT, kNN, kTN };

// D = act(alpha * A B + beta * D). Pointers are 16-byte aligned and leading dimensions multiples of 8 elements (4 for
// a float32 D); m, n and k are arbitrary, but elements between the width of a row and the next multiple of 8 must be
// readable in A and B (and zero where they face k), and are scratch in D.
struct Gemm {
  GemmKind kind;
  int32_t dtype;  // LEMO_F16 or LEMO_BF16
  int64_t m, n, k;
  const void* a;
  int64_t lda;
  const void* b;
  int64_t ldb;
  void* d;
  int64_t ldd;
  float alpha = 1.0f;
  const float* alpha_device = nullptr;  // kNN, kTN: replaces alpha
  float beta = 0.0f;
  bool relu = false;  // kNT
};

// Bytes of workspace (16-byte aligned); a function of kind and sizes. Throws lemo::Error if no kernel fits.
uint64_t gemm_workspace(int device, const Gemm& g);
void gemm(int device, cudaStream_t stream, const Gemm& g, void* workspace);

// One architecture's kernels. `multiprocessors` decides how far k is split when D has few tiles.
struct GemmKernels {
  uint64_t (*workspace)(const Gemm& g, int device, int multiprocessors);
  void (*run)(const Gemm& g, int device, int multiprocessors, void* workspace, cudaStream_t stream);
};
namespace sm90 {
GemmKernels gemm_bf16();
GemmKernels gemm_f16();
}  // namespace sm90
namespace sm80 {
GemmKernels gemm_bf16();
GemmKernels gemm_f16();
}  // namespace sm80

}  // namespace lemo::cuda
