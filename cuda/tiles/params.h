// Parameters of the tile kernels: attention mass of key tiles, their choice, and their lists.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/documents.h"
#include "lemo/attention.h"

namespace lemo::cuda::tiling {

constexpr int kTile = LEMO_TILE_ROWS;

// Tiles over which the first stage of the reduction sums a row's softmax.
constexpr int kChunk = 128;

// A "probe row" is one probe of one query head. Those of a query tile that share a key head lie next to each other:
// (probe, head of the group).
struct ScoreParams {
  TensorView q, k;
  Documents documents;
  int64_t first_slot;
  int32_t slots;      // C, query tiles of the strip
  int32_t key_tiles;  // tiles of the longest document
  int32_t heads;
  int32_t group;  // query heads per key head
  int32_t probes;
  float scale_log2;  // scale * log2(e), above 0
  float* partial;    // workspace [slots, key_tiles, heads * probes]: log2 of a tile's sum of exp2, by probe row
  float* sums;       // workspace [slots, chunks, heads * probes]: log2 of a chunk's sum of exp2
  int32_t chunks;    // of kChunk key tiles
  float* scores;
  int64_t scores_stride;
  float* peaks;  // or null
  int64_t peaks_stride;
  int64_t width;  // W
};

// Fills `partial`; one definition per head_dim, in instantiations/.
template <int kHeadDim>
void launch_partial(const ScoreParams& params, int32_t dtype, cudaStream_t stream);

}  // namespace lemo::cuda::tiling
