#include "gemm/sm90/gemm.h"

namespace lemo::cuda::sm90 {
GemmKernels gemm_bf16() { return kernels<cutlass::bfloat16_t>(); }
}  // namespace lemo::cuda::sm90
