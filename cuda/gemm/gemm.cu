// Picks the kernels of the device at hand; alignment rules of the matrix products.
#include "common/check.h"
#include "common/gemm.h"

namespace lemo::cuda {
namespace {

GemmKernels kernels_for(int capability, int32_t dtype) {
  if (dtype != LEMO_BF16 && dtype != LEMO_F16) {
    throw Error(LEMO_UNSUPPORTED, "matrix product: expected float16 or bfloat16 on CUDA");
  }
#ifdef LEMO_CUDA_SM90
  if (capability == 90) return dtype == LEMO_BF16 ? sm90::gemm_bf16() : sm90::gemm_f16();
#endif
#ifdef LEMO_CUDA_SM80
  if (capability >= 80) return dtype == LEMO_BF16 ? sm80::gemm_bf16() : sm80::gemm_f16();
#endif
  throw Error(LEMO_UNSUPPORTED, "exec.device_index: this build has no matrix kernels for compute capability " +
                                    std::to_string(capability / 10) + "." + std::to_string(capability % 10));
}

void check_alignment(const Gemm& g) {
  const int64_t out_multiple = g.kind == GemmKind::kTN ? 4 : 8;
  const bool aligned = g.lda % 8 == 0 && g.ldb % 8 == 0 && g.ldd % out_multiple == 0 &&
                       reinterpret_cast<uintptr_t>(g.a) % 16 == 0 && reinterpret_cast<uintptr_t>(g.b) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(g.d) % 16 == 0;
  if (!aligned) {
    throw Error(LEMO_INVALID_ARGUMENT,
                "matrix product: expected 16-byte aligned operands and row strides that are multiples of 16 bytes");
  }
}

}  // namespace

uint64_t gemm_workspace(int device, const Gemm& g) {
  if (g.m == 0 || g.n == 0) return 0;
  const DeviceInfo info = device_info(device);
  return kernels_for(info.capability, g.dtype).workspace(g, device, info.multiprocessors);
}

void gemm(int device, cudaStream_t stream, const Gemm& g, void* workspace) {
  if (g.m == 0 || g.n == 0) return;
  const DeviceInfo info = device_info(device);
  const GemmKernels kernels = kernels_for(info.capability, g.dtype);
  check_alignment(g);
  kernels.run(g, device, info.multiprocessors, workspace, stream);
}

}  // namespace lemo::cuda
