#include "tiles/partial_kernel.cuh"

namespace lemo::cuda::tiling {
template <>
void launch_partial<256>(const ScoreParams& params, int32_t dtype, cudaStream_t stream) {
  with_type(dtype, "tile_scores", [&](auto type) { run_partial<decltype(type), 256>(params, stream); });
}
}  // namespace lemo::cuda::tiling
