#include "scores/sm80/scores_kernel.cuh"

namespace lemo::cuda::scoring::sm80 {
template <>
void launch_scores<80>(const Params& params, int32_t dtype, cudaStream_t stream) {
  with_type(dtype, "scores", [&](auto type) { run_scores<decltype(type), 80>(params, stream); });
}
}  // namespace lemo::cuda::scoring::sm80
