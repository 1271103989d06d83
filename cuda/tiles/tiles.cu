// The tile entries of the backend table: arguments to kernel parameters, workspace, launches.
#include <algorithm>
#include <cmath>

#include "common/constants.h"
#include "common/launch.h"
#include "kernels.h"
#include "tiles/list_kernel.cuh"
#include "tiles/params.h"
#include "tiles/reduce_kernel.cuh"
#include "tiles/select_kernel.cuh"

namespace lemo::cuda {
namespace {

using tiling::kTile;
using tiling::ListParams;
using tiling::ScoreParams;
using tiling::SelectParams;

Documents documents_of(const lemo_tensor& cu_seqlens, const lemo_tensor& rows, int64_t capacity) {
  return {data<const int32_t>(cu_seqlens), data<const int32_t>(rows), static_cast<int32_t>(cu_seqlens.shape[0] - 1),
          capacity, false};
}

uint64_t layout(const lemo_tile_scores_args& args, void* base, ScoreParams& params) {
  const int64_t capacity = present(args.rows) ? args.rows.shape[0] : args.q.shape[0];
  params.documents = documents_of(args.cu_seqlens, args.rows, capacity);
  params.slots = static_cast<int32_t>(args.scores.shape[0]);
  params.key_tiles = static_cast<int32_t>(ceil_div(std::min(args.max_seqlen, capacity), kTile));
  params.heads = static_cast<int32_t>(args.q.shape[1]);
  params.probes = args.probes;
  params.chunks = static_cast<int32_t>(ceil_div(params.key_tiles, tiling::kChunk));
  const Size rows = Size(params.slots) * params.heads * params.probes;
  Arena arena(base);
  params.partial = arena.take<float>(rows * params.key_tiles);
  params.sums = arena.take<float>(rows * params.chunks);
  return arena.size();
}

}  // namespace

uint64_t tile_scores_workspace(const lemo_exec&, const lemo_tile_scores_args& args) {
  ScoreParams params{};
  return layout(args, nullptr, params);
}

void tile_scores(const lemo_exec& exec, const lemo_tile_scores_args& args) {
  constexpr const char* kName = "tile_scores";
  ScoreParams params{};
  layout(args, exec.workspace, params);
  params.q = {args.q.data, args.q.stride[0], args.q.stride[1]};
  params.k = {args.k.data, args.k.stride[0], args.k.stride[1]};
  params.first_slot = args.first_slot;
  params.group = static_cast<int32_t>(args.q.shape[1] / args.k.shape[1]);
  // Not 0, which would turn the -infinity of a masked score into NaN.
  params.scale_log2 = std::max(args.scale * kLog2E, 1e-30f);
  params.scores = data<float>(args.scores);
  params.scores_stride = row_stride(args.scores);
  params.peaks = data<float>(args.peaks);
  params.peaks_stride = present(args.peaks) ? row_stride(args.peaks) : 0;
  params.width = args.scores.shape[1];
  if (params.slots <= 0 || params.width <= 0) return;
  const DeviceGuard guard(exec.device_index);
  const cudaStream_t stream = stream_of(exec);
  const auto grid = [&](int64_t chunks) {
    return dim3(static_cast<unsigned>(params.slots), static_cast<unsigned>(chunks));
  };
  if (params.key_tiles > 0) {
    with_head_dim<true>(kName, args.q.shape[2], [&](auto head_dim) {
      tiling::launch_partial<decltype(head_dim)::value>(params, args.q.dtype, stream);
    });
    launch(kName, tiling::sum_chunks, grid(params.chunks), tiling::kReduceThreads, 0, stream, params);
  }
  launch(kName, tiling::sum_masses, grid(ceil_div(params.width, tiling::kChunk)), tiling::kReduceThreads, 0, stream,
         params);
}

void select_tiles(const lemo_exec& exec, const lemo_select_tiles_args& args) {
  constexpr const char* kName = "select_tiles";
  SelectParams params{};
  params.scores = data<const float>(args.scores);
  params.scores_stride = row_stride(args.scores);
  const lemo_tensor& masses = present(args.masses) ? args.masses : args.scores;
  params.masses = data<const float>(masses);
  params.masses_stride = row_stride(masses);
  params.documents = documents_of(args.cu_seqlens, {}, 0);
  params.first_slot = args.first_slot;
  params.most = static_cast<int32_t>(std::min<int64_t>((args.keys - 1) / kTile + 1, INT32_MAX));
  params.density = args.density;
  params.mass =
      args.mass < 1.0f ? static_cast<uint64_t>(std::ceil(static_cast<double>(args.mass) * 0x1p40)) : tiling::kNoLimit;
  params.first = args.first;
  params.local = args.local;
  params.chosen = data<int32_t>(args.chosen);
  params.chosen_stride = row_stride(args.chosen);
  params.words = static_cast<int32_t>(args.chosen.shape[1]);
  params.covered = data<float>(args.covered);
  const int64_t slots = args.scores.shape[0];
  if (slots <= 0) return;
  const DeviceGuard guard(exec.device_index);
  launch(kName, tiling::choose_tiles, dim3(static_cast<unsigned>(slots)), tiling::kSelectThreads, 0, stream_of(exec),
         params);
}

void list_tiles(const lemo_exec& exec, const lemo_list_tiles_args& args) {
  constexpr const char* kName = "list_tiles";
  ListParams params{};
  params.chosen = data<const int32_t>(args.chosen);
  params.chosen_stride = row_stride(args.chosen);
  params.words = static_cast<int32_t>(args.chosen.shape[1]);
  params.documents = documents_of(args.cu_seqlens, {}, 0);
  params.slots = static_cast<int32_t>(args.chosen.shape[0]);
  params.capacity = args.tiles.shape[0];
  params.offsets = data<int32_t>(args.tile_offsets);
  params.tiles = data<int32_t>(args.tiles);
  params.transposed_offsets = data<int32_t>(args.transposed_offsets);
  params.transposed_tiles = data<int32_t>(args.transposed_tiles);
  const DeviceGuard guard(exec.device_index);
  const cudaStream_t stream = stream_of(exec);
  const dim3 grid(static_cast<unsigned>(ceil_div(params.slots, tiling::kListThreads / 32)));
  launch(kName, tiling::count_tiles, grid, tiling::kListThreads, 0, stream, params);
  launch(kName, tiling::scan_counts, dim3(2), tiling::kScanThreads, 0, stream, params);
  launch(kName, tiling::fill_lists, grid, tiling::kListThreads, 0, stream, params);
}

}  // namespace lemo::cuda
