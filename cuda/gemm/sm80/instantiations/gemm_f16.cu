#include "gemm/sm80/gemm.h"

namespace lemo::cuda::sm80 {
GemmKernels gemm_f16() { return kernels<cutlass::half_t>(); }
}  // namespace lemo::cuda::sm80
