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

#define LEMO_ENTRY(op) cuda::op,
#define LEMO_ENTRY_WITH_WORKSPACE(op) cuda::op, cuda::op##_workspace,
const Backend& cuda_backend() {
  static const Backend backend = {"cuda", available, LEMO_OPERATIONS(LEMO_ENTRY, LEMO_ENTRY_WITH_WORKSPACE)};
  return backend;
}

}  // namespace lemo
