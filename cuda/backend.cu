// The CUDA backend's table.
#include <cuda_runtime.h>

#include "kernels.h"

namespace lemo {
namespace {

bool available() {
  int count = 0;
  const bool ok = cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
  if (!ok) cudaGetLastError();  // a missing driver must not show up as the error of a later call
  return ok;
}

}  // namespace

const Backend& cuda_backend() {
  static const Backend backend = {
      "cuda",
      available,
      cuda::select,
      cuda::scores,
      cuda::predict,
      cuda::gather,
      cuda::scatter_add,
      cuda::gather_norm,
      cuda::gather_norm_backward,
      cuda::attention_forward,
      cuda::attention_backward,
      cuda::linear_cross_entropy,
      cuda::select_workspace,
      cuda::scores_workspace,
      cuda::predict_workspace,
      cuda::gather_norm_backward_workspace,
      cuda::attention_forward_workspace,
      cuda::attention_backward_workspace,
      cuda::linear_cross_entropy_workspace,
  };
  return backend;
}

}  // namespace lemo
