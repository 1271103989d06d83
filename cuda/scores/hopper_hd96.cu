// Serves head_dim 80 too; only in builds with every kernel.
#ifdef LEMO_CUDA_ALL_KERNELS
#include "hopper_kernel.cuh"

namespace lemo::cuda::scoring::hopper {
template <>
void launch_scores<96>(const Params& params, int32_t dtype, cudaStream_t stream) {
  with_type(dtype, "scores", [&](auto type) { run_scores<decltype(type), 96>(params, dtype, stream); });
}
}  // namespace lemo::cuda::scoring::hopper
#endif
