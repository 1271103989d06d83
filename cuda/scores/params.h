// Parameters of the scores kernels, and how their work is divided.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/documents.h"

namespace lemo::cuda::scoring {

struct Params {
  TensorView q, k;
  const int32_t* offsets;    // [blocks + 1] first token of every block
  const int32_t* documents;  // [document_count + 1] first block of every document
  int32_t block_count;
  int32_t document_count;
  int32_t block_size;
  int32_t heads;
  int32_t group;  // query heads per key head
  float scale;
  int32_t normalize;
  float* scores;
  float* map;  // or null
  int64_t map_stride;
  float* partial;  // workspace [splits, blocks]
  int32_t splits;

  // For the sm_90a kernel.
  int64_t tokens;
  int32_t head_dim;
  int* counter;  // workspace; null: the kernel for sm_80
};

// A key unit is as many whole blocks as fit 64 tokens, or one larger block; a query unit likewise with 128.
constexpr int kKeyTokens = 64;
constexpr int kQueryTokens = 128;
constexpr int kMaxBlock = 256;

// Key units of all documents in one grid dimension: document d begins at floor(documents[d] / blocks per unit) + d.
inline int64_t key_unit_slots(int64_t blocks, int64_t documents, int block_size) {
  const int per_unit = block_size < kKeyTokens ? kKeyTokens / block_size : 1;
  return blocks / per_unit + documents;
}

// Thread blocks that share one key unit's queries: as many as bring the grid to kWanted, at most kMost. A function of
// shapes alone, so that results are the same on every device.
inline int split_count(int64_t slots) {
  constexpr int64_t kWanted = 4096, kMost = 64;
  const int64_t splits = (kWanted + slots - 1) / slots;
  return static_cast<int>(splits < kMost ? splits : kMost);
}

// One definition per head_dim, in instantiations/. The caller has cleared the map; the sum of `partial` is left to it.
namespace sm80 {
template <int kHeadDim>
void launch_scores(const Params& params, int32_t dtype, cudaStream_t stream);
}  // namespace sm80

// The same on sm_90a, one definition per padded head_dim (common/sm90/padded_head_dim.h).
namespace sm90 {
template <int kHeadDim>
void launch_scores(const Params& params, int32_t dtype, cudaStream_t stream);
}  // namespace sm90

}  // namespace lemo::cuda::scoring
