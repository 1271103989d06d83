#include "attention/sm90/backward_launch.cuh"
#include "attention/sm90/backward_wide.cuh"

namespace lemo::cuda::attention::sm90 {
namespace {

template <bool kSoftCap>
void run(const BackwardParams& params, int32_t dtype, cudaStream_t stream) {
  const BackwardLayout layout =
      backward_layout<256>({params.documents, params.heads, params.key_heads, params.deterministic, false,
                            params.list_capacity, true, params.key_documents.capacity});
  const BackwardKernelParams kernel_params = backward_kernel_params<256>(params, layout, dtype);
  const dim3 tiles(static_cast<unsigned>(layout.slots * params.heads));
  constexpr const char* kName = "attention_backward";
  with_type(dtype, kName, [&](auto type) {
    using T = decltype(type);
    using Wide = WideBackward<T, kSoftCap>;
    launch_window_edges(kName, {params.documents, params.key_documents, params.options, true, kernel_params.edges},
                        stream);
    launch(kName, backward_stats_kernel<T, 256>, tiles, kTileThreads, 0, stream, kernel_params);
    launch(kName, wide_backward_kernel_sm90<T, kSoftCap>,
           static_cast<unsigned>(kernel_params.key_slots * Wide::kHalves * params.key_heads),
           (kBackwardConsumers + 1) * 128, static_cast<int>(sizeof(typename Wide::Shared)), stream, kernel_params);
    launch(kName, backward_dq_kernel<T, 256>, tiles, kTileThreads, 0, stream, kernel_params);
  });
}

}  // namespace

template <>
int64_t backward_workspace<256>(const BackwardSizes& sizes) {
  return backward_layout<256>(sizes).bytes;
}
template <>
void launch_backward_window<256>(const BackwardParams& params, int32_t dtype, cudaStream_t stream) {
  run<false>(params, dtype, stream);
}
template <>
void launch_backward_softcap<256>(const BackwardParams& params, int32_t dtype, cudaStream_t stream) {
  run<true>(params, dtype, stream);
}
}  // namespace lemo::cuda::attention::sm90
