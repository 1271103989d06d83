// Kernel launches and the choice of the element type, shared by attention and scores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <string>

#include "cuda/common/check.h"

namespace lemo::cuda {

template <typename Kernel, typename... Args>
void launch(Kernel kernel, dim3 grid, int threads, int shared_bytes, cudaStream_t stream, const Args&... args) {
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               shared_bytes),
          "cudaFuncSetAttribute");
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(args...);
  check_launch("attention and scores kernels");
}

// Calls run(T{}) with the element type of `dtype`. Builds without LEMO_CUDA_ALL_KERNELS hold the bf16 kernels only.
template <typename Run>
void with_type(int32_t dtype, const char* operation, Run run) {
  if (dtype == LEMO_BF16) return run(__nv_bfloat16{});
#ifdef LEMO_CUDA_ALL_KERNELS
  if (dtype == LEMO_F16) return run(__half{});
#endif
  throw Error(LEMO_UNSUPPORTED,
              std::string(operation) + ": this build has no CUDA kernel for dtype " +
                  (dtype == LEMO_F16 ? "float16 (use bfloat16, or a build with every kernel)" : "float32"));
}

}  // namespace lemo::cuda
