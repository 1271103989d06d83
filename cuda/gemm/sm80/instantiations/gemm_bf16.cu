#include "gemm/sm80/gemm.h"

namespace lemo::cuda::sm80 {
GemmKernels gemm_bf16() { return kernels<cutlass::bfloat16_t>(); }
}  // namespace lemo::cuda::sm80
