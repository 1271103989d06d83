#include "attention/sm80/backward_launch.cuh"

namespace lemo::cuda::attention::sm80 {
template <>
void launch_backward_options<256>(const BackwardParams& params, int32_t dtype, cudaStream_t stream) {
  with_type(dtype, "attention_backward", [&](auto type) { run_backward<decltype(type), 256, true>(params, stream); });
}
}  // namespace lemo::cuda::attention::sm80
