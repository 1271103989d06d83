#include "attention/aligned_rows.cuh"
#include "attention/sm90/window_edges.h"
#include "common/launch.h"

namespace lemo::cuda::attention::sm90 {
namespace {

constexpr int kThreads = 128;

__device__ __forceinline__ int64_t place_of(const int32_t* places, int row) {
  return places != nullptr ? places[row] : row;
}

// A thread per packed row.
__global__ void __launch_bounds__(kThreads) window_edges_kernel(const __grid_constant__ WindowEdges params) {
  const bool of_keys = params.of_keys;
  const Documents& rows = of_keys ? params.keys : params.queries;
  const int row = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (row >= rows.cu_seqlens[rows.count]) return;
  const AlignedDocument document =
      align_document<kAlignedRows>(params.queries, params.keys, locate_document(rows, 1, 0, row));
  const ScoreOptions& options = params.options;
  const int64_t bound = of_keys ? place_of(options.key_places, row) + options.window
                                : place_of(options.places, row) - (options.window - 1);
  // The first of the other side's rows whose place is at least `bound`, or their end.
  const int32_t* places = of_keys ? options.places : options.key_places;
  const int start = of_keys ? document.query_start : document.key_start;
  int low = of_keys ? document.first : -document.ahead, high = document.length;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (place_of(places, start + middle) < bound) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  params.edges[row] = low;
}

}  // namespace

void launch_window_edges(const char* operation, const WindowEdges& params, cudaStream_t stream) {
  const int64_t rows = (params.of_keys ? params.keys : params.queries).capacity;
  launch(operation, window_edges_kernel, static_cast<unsigned>((rows + kThreads - 1) / kThreads), kThreads, 0, stream,
         params);
}

}  // namespace lemo::cuda::attention::sm90
