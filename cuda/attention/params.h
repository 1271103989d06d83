// Parameters of the attention kernels, and the functions that launch them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/documents.h"

namespace lemo::cuda::attention {

// Two-dimensional sparsity, in tiles of 128 packed rows counted from the start of each document: the tiles that a tile
// visits in addition to the diagonal one. Tile i of document d has the slot cu_seqlens[d] / 128 + d + i.
struct TileLists {
  const int32_t* offsets;  // [slots + 1]; null: every tile visits all that causality allows
  const int32_t* tiles;    // tile numbers within the document
};

// What the family of a model adds to scores. Kernels have separate instantiations with these.
struct ScoreOptions {
  int64_t window;             // a query sees the keys whose places are above its own - window; 0: all. Not with lists
  const int32_t* places;      // of packed query rows, ascending within a document; null: the number of the row
  const int32_t* key_places;  // of packed key rows
  float softcap;              // c > 0: the softmax is over c tanh(scale * q.k / c); 0: over scale * q.k
  bool present() const { return window != 0 || softcap != 0.0f; }
};

struct ForwardParams {
  TensorView q, k, v, out;
  float* lse;
  int64_t lse_stride;
  Documents documents;  // of queries
  Documents key_documents;
  TileLists lists;
  int64_t storage_rows;  // extent of q and out
  int64_t key_storage_rows;
  int32_t heads;
  int32_t group;  // query heads per key head
  int32_t head_dim;
  float scale;
  ScoreOptions options;
  // For the sm_90a kernels.
  const float* sinks;  // of query heads, if the kernel itself adds them
  int* counter;        // workspace
  int32_t* edges;      // with a window: workspace [capacity]
};

struct BackwardParams {
  TensorView dout, q, k, v, out, dq, dk, dv;
  const float* lse;
  int64_t lse_stride;
  Documents documents;  // of queries
  Documents key_documents;
  const float* key_weights;  // null: every weight is 1
  const int32_t* row_slots;  // of queries
  const int32_t* key_row_slots;
  int32_t heads;
  int32_t key_heads;
  int32_t group;
  float scale;
  ScoreOptions options;
  float* delta;     // sm_80, workspace [heads, capacity]: dout . out
  float* dq_float;  // sm_80, workspace [capacity, heads, head_dim], or null: a separate kernel computes dq
  TileLists lists;  // transposed: the query tiles of each key tile

  // For the sm_90a kernels.
  int64_t list_capacity;  // entries that lists.tiles has room for
  int64_t storage_rows;   // extent of dout, q and out
  int64_t key_storage_rows;
  int32_t head_dim;
  bool deterministic;
  void* workspace;  // sm90::backward_workspace bytes

  // For the sm_80 kernel that computes dq, workspace: the lists transposed again, the key tiles of each query tile.
  int32_t* query_list_offsets;  // [slots + 1]
  int32_t* query_list_tiles;    // [list_capacity]
};

// The square that rows are aligned to (aligned_rows.cuh) wherever tiles divide it.
constexpr int kAlignedRows = 128;

// Rows without a counterpart on the other side of their document: queries that see no key, or keys of no query.
struct BlankRows {
  Documents rows;
  Documents others;
  bool keys;              // what `rows` are
  TensorView tensors[2];  // zeroed; the second may be absent (null)
  int32_t heads;
  int32_t head_dim;
  float* lse;  // set to -infinity; null: absent
  int64_t lse_stride;
};
void launch_blank_rows(const BlankRows& params, cudaStream_t stream);

// Logits [heads] that join the denominator only (-infinity: none).
struct Sinks {
  const float* sinks;
  TensorView out;  // rescaled
  float* lse;      // with the sink from then on
  int64_t lse_stride;
  Documents documents;  // of queries
  int32_t heads;
  int32_t head_dim;
};
void launch_add_sinks(const Sinks& params, int32_t dtype, cudaStream_t stream);

struct SinkGradient {
  const float* sinks;
  TensorView dout, out;
  const float* lse;
  int64_t lse_stride;
  Documents documents;  // of queries
  int32_t heads;
  int32_t head_dim;
  float* dsinks;  // [heads]
};
void launch_sink_gradient(const SinkGradient& params, int32_t dtype, cudaStream_t stream);

// One definition per head_dim, in instantiations/; each throws LEMO_UNSUPPORTED for a type this build leaves out.
namespace sm80 {
template <int kHeadDim>
void launch_forward(const ForwardParams& params, int32_t dtype, cudaStream_t stream);
template <int kHeadDim>
void launch_backward(const BackwardParams& params, int32_t dtype, cudaStream_t stream);
// With options of scores, or head_dim 256.
template <int kHeadDim>
void launch_forward_options(const ForwardParams& params, int32_t dtype, cudaStream_t stream);
template <int kHeadDim>
void launch_backward_options(const BackwardParams& params, int32_t dtype, cudaStream_t stream);
}  // namespace sm80

// The same on sm_90a, one definition per padded head_dim (common/sm90/padded_head_dim.h).
namespace sm90 {
template <int kHeadDim>
void launch_forward(const ForwardParams& params, int32_t dtype, cudaStream_t stream);
template <int kHeadDim>
void launch_backward(const BackwardParams& params, int32_t dtype, cudaStream_t stream);
// With a window, and with sinks or without. (The backward pass takes sinks from lse.)
template <int kHeadDim>
void launch_forward_window(const ForwardParams& params, int32_t dtype, cudaStream_t stream);
template <int kHeadDim>
void launch_backward_window(const BackwardParams& params, int32_t dtype, cudaStream_t stream);
// With a soft-cap, and a window that may hide nothing: at the head_dims that models have with soft-caps. (At head_dim
// 256, those with a window and with a soft-cap are all there is, the backward ones in any order and without weights.)
constexpr int kSoftcapHeadDim = 128;
template <int kHeadDim>
void launch_forward_softcap(const ForwardParams& params, int32_t dtype, cudaStream_t stream);
template <int kHeadDim>
void launch_backward_softcap(const BackwardParams& params, int32_t dtype, cudaStream_t stream);
// With sinks and no window, at the head_dim of gpt-oss only.
constexpr int kSinksHeadDim = 64;
template <int kHeadDim>
void launch_forward_sinks(const ForwardParams& params, int32_t dtype, cudaStream_t stream);
struct BackwardSizes {
  Documents documents;
  int64_t heads;
  int64_t key_heads;
  bool deterministic;
  bool listed;            // whether there are tile lists
  int64_t list_capacity;  // BackwardParams
  bool window;
  int64_t key_capacity;
};
template <int kHeadDim>
int64_t backward_workspace(const BackwardSizes& sizes);
}  // namespace sm90

}  // namespace lemo::cuda::attention
