#include "attention/sm80/forward_kernel.cuh"

namespace lemo::cuda::attention::sm80 {
template <>
void launch_forward_options<256>(const ForwardParams& params, int32_t dtype, cudaStream_t stream) {
  with_type(dtype, "attention_forward", [&](auto type) { run_forward<decltype(type), 256, true>(params, stream); });
}
}  // namespace lemo::cuda::attention::sm80
