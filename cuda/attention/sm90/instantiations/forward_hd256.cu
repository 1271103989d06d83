#include "attention/sm90/forward_launch.cuh"

namespace lemo::cuda::attention::sm90 {
template <>
void launch_forward_window<256>(const ForwardParams& params, int32_t dtype, cudaStream_t stream) {
  with_type(dtype, "attention_forward",
            [&](auto type) { run_forward_as<decltype(type), 256, Visits::kWindow, true>(params, dtype, stream); });
}
template <>
void launch_forward_softcap<256>(const ForwardParams& params, int32_t dtype, cudaStream_t stream) {
  with_type(dtype, "attention_forward", [&](auto type) {
    run_forward_as<decltype(type), 256, Visits::kWindow, true, true>(params, dtype, stream);
  });
}
}  // namespace lemo::cuda::attention::sm90
