// Kernel launches and the choice of element type and head_dim, shared by attention and scores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <string>
#include <type_traits>

#include "common/check.h"

namespace lemo::cuda {

template <typename Kernel, typename... Args>
void launch(const char* operation, Kernel kernel, dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
            const Args&... args) {
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               shared_bytes),
          operation);
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(args...);
  check_launch(operation);
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

// Calls run(std::integral_constant<int, head_dim>). Builds without LEMO_CUDA_ALL_KERNELS hold 64 and 128 only.
template <typename Run>
void with_head_dim(const char* operation, int64_t head_dim, Run run) {
  switch (head_dim) {
    case 64:
      return run(std::integral_constant<int, 64>{});
    case 128:
      return run(std::integral_constant<int, 128>{});
#ifdef LEMO_CUDA_ALL_KERNELS
    case 80:
      return run(std::integral_constant<int, 80>{});
    case 96:
      return run(std::integral_constant<int, 96>{});
#endif
    default:
#ifdef LEMO_CUDA_ALL_KERNELS
      constexpr const char* kHere = "64, 80, 96 or 128";
#else
      constexpr const char* kHere = "64 or 128 (80 and 96 need a build with every kernel)";
#endif
      throw Error(LEMO_UNSUPPORTED,
                  std::string(operation) + ": q: expected head_dim " + kHere + ", got " + std::to_string(head_dim));
  }
}

}  // namespace lemo::cuda
