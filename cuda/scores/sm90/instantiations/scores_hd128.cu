#include "scores/sm90/scores_kernel.cuh"

namespace lemo::cuda::scoring::sm90 {
template <>
void launch_scores<128>(const Params& params, int32_t dtype, cudaStream_t stream) {
  with_type(dtype, "scores", [&](auto type) { run_scores<decltype(type), 128>(params, dtype, stream); });
}
}  // namespace lemo::cuda::scoring::sm90
