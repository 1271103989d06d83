#include "attention/sm90/backward_launch.cuh"

namespace lemo::cuda::attention::sm90 {
template <>
void launch_backward_softcap<128>(const BackwardParams& params, int32_t dtype, cudaStream_t stream) {
  with_type(dtype, "attention_backward",
            [&](auto type) { run_backward<decltype(type), 128, true, true>(params, dtype, stream); });
}
}  // namespace lemo::cuda::attention::sm90
