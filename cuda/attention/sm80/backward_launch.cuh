// The kernels of one backward pass, in order.
#pragma once

#include "attention/sm80/backward_rows.cuh"
#include "attention/sm80/key_gradient.cuh"
#include "attention/sm80/query_gradient.cuh"
#include "attention/sm80/query_lists.h"

namespace lemo::cuda::attention::sm80 {

// kOptions as in the kernels.
template <typename T, int kHeadDim, bool kOptions>
void run_backward(const BackwardParams& params, cudaStream_t stream) {
  const Documents& documents = params.documents;
  const dim3 row_grid(static_cast<unsigned>((documents.capacity * params.heads + kRowPassItems - 1) / kRowPassItems));
  launch("attention_backward", delta_kernel<T, kHeadDim>, row_grid, kRowPassThreads, 0, stream, params);

  using KeyConfig = KeyGradientConfig<kHeadDim, kOptions>;
  const int64_t key_slots = tile_slots(params.key_documents, KeyConfig::kKeys);
  const bool split = documents.aligned, listed = params.lists.offsets != nullptr;
  const auto key_kernel = split    ? key_gradient_kernel<T, kHeadDim, true, false, kOptions>
                          : listed ? key_gradient_kernel<T, kHeadDim, false, true, kOptions>
                                   : key_gradient_kernel<T, kHeadDim, false, false, kOptions>;
  launch("attention_backward", key_kernel,
         static_cast<unsigned>(key_slots * params.key_heads * KeyConfig::kColumnParts), KeyConfig::kWarps * 32,
         KeyGradientLayout<kHeadDim, kOptions>::kBytes, stream, params);

  if (params.dq_float != nullptr) {
    launch("attention_backward", convert_kernel<T, kHeadDim>, row_grid, kRowPassThreads, 0, stream, params);
  } else {
    using QueryConfig = QueryGradientConfig<kHeadDim>;
    const int64_t slots = query_slots<kAlignedRows>(documents, QueryConfig::kQueries);
    if (listed) {
      launch_query_lists({documents, params.lists, static_cast<int>(tile_slots(documents, LEMO_TILE_ROWS)),
                          params.query_list_offsets, params.query_list_tiles},
                         stream);
    }
    const auto kernel = split    ? query_gradient_kernel<T, kHeadDim, true, false, kOptions>
                        : listed ? query_gradient_kernel<T, kHeadDim, false, true, kOptions>
                                 : query_gradient_kernel<T, kHeadDim, false, false, kOptions>;
    launch("attention_backward", kernel, static_cast<unsigned>(slots * params.heads), QueryConfig::kWarps * 32,
           QueryGradientLayout<kHeadDim>::kBytes, stream, params);
  }
}

}  // namespace lemo::cuda::attention::sm80
