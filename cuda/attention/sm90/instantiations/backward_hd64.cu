#include "attention/sm90/backward_launch.cuh"

namespace lemo::cuda::attention::sm90 {
template <>
int64_t backward_workspace<64>(const BackwardSizes& sizes) {
  return backward_layout<64>(sizes).bytes;
}
template <>
void launch_backward<64>(const BackwardParams& params, int32_t dtype, cudaStream_t stream) {
  with_type(dtype, "attention_backward", [&](auto type) { run_backward<decltype(type), 64>(params, dtype, stream); });
}
}  // namespace lemo::cuda::attention::sm90
