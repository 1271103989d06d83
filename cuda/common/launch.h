// Kernel launches and the choice of element type and head_dim, shared by attention and scores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <string>
#include <type_traits>

#include "common/check.h"

namespace lemo::cuda {

// What went wrong when a kernel asked for `bytes` of shared memory a thread block.
[[noreturn]] inline void refuse_shared_memory(const char* operation, cudaError_t status, int bytes) {
  int device = 0, most = 0;
  cudaGetLastError();
  check(cudaGetDevice(&device), operation);
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), operation);
  if (bytes > most) {
    throw Error(LEMO_UNSUPPORTED, std::string(operation) + ": expected a GPU with " + std::to_string(bytes >> 10) +
                                      " KiB of shared memory a thread block, as those of compute capability 8.0 and "
                                      "9.0 have, got one with " +
                                      std::to_string(most >> 10) + " KiB");
  }
  check(status, operation);
  throw Error(LEMO_BACKEND_ERROR, operation);
}

template <typename Kernel, typename... Args>
void launch(const char* operation, Kernel kernel, dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
            const Args&... args) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (status != cudaSuccess) refuse_shared_memory(operation, status, shared_bytes);
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

// Calls run(std::integral_constant<int, head_dim>). Builds without LEMO_CUDA_ALL_KERNELS hold 64 and 128 only, and 256
// if the operation has it (kWith256).
template <bool kWith256 = false, typename Run>
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
      if constexpr (kWith256) {
        if (head_dim == 256) return run(std::integral_constant<int, 256>{});
      }
#ifdef LEMO_CUDA_ALL_KERNELS
      constexpr const char* kHere = kWith256 ? "64, 80, 96, 128 or 256" : "64, 80, 96 or 128";
      constexpr const char* kElsewhere = "";
#else
      constexpr const char* kHere = kWith256 ? "64, 128 or 256" : "64 or 128";
      constexpr const char* kElsewhere = " (80 and 96 need a build with every kernel)";
#endif
      throw Error(LEMO_UNSUPPORTED, std::string(operation) + ": q: expected head_dim " + kHere + kElsewhere + ", got " +
                                        std::to_string(head_dim));
  }
}

}  // namespace lemo::cuda
