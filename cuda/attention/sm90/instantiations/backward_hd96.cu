#include "attention/sm90/backward_launch.cuh"

namespace lemo::cuda::attention::sm90 {
template <>
int64_t backward_workspace<96>(const BackwardSizes& sizes) {
  return backward_layout<96>(sizes).bytes;
}
template <>
void launch_backward<96>(const BackwardParams& params, int32_t dtype, cudaStream_t stream) {
  with_type(dtype, "attention_backward", [&](auto type) { run_backward<decltype(type), 96>(params, dtype, stream); });
}
}  // namespace lemo::cuda::attention::sm90
