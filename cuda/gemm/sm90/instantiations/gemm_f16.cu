#include "gemm/sm90/gemm.h"

namespace lemo::cuda::sm90 {
GemmKernels gemm_f16() { return kernels<cutlass::half_t>(); }
}  // namespace lemo::cuda::sm90
