// Predicted informativeness. The networks run in chunks of tokens: two tensor-core products with ReLU in the epilogue,
// then pooling into float32 [num_blocks, s]. ReLU networks without biases are positively homogeneous, so the norm's
// 1/r is applied to the pooled activations and x is read as it is.
#include "cuda/common/check.h"
#include "cuda/common/gemm.h"
#include "cuda/kernels.h"
#include "cuda/predict/pool.h"
#include "cuda/rows/rows.cuh"

namespace lemo::cuda {
namespace {

constexpr int64_t kChunkTokens = 16384;

struct Workspace {
  float* rstd;     // [T]
  void* hidden;    // [chunk, max r]
  void* active;    // [chunk, max s]
  float* pooled;   // [num_blocks, max s]
  float* queries;  // [num_blocks, c]
  float* keys;     // [num_blocks, c]
  float* suffix;   // [num_blocks, c]
  void* gemm;
  uint64_t bytes;
};

struct Sizes {
  int64_t tokens, chunk, blocks, r, s, c;
};

Sizes sizes_of(const lemo_predict_args& a) {
  Sizes size = {};
  size.tokens = a.x.shape[0];
  size.chunk = size.tokens < kChunkTokens ? size.tokens : kChunkTokens;
  size.blocks = a.blocks.offsets.shape[0] - 1;
  size.r = a.wq1.shape[0] > a.wk1.shape[0] ? a.wq1.shape[0] : a.wk1.shape[0];
  size.s = a.wq2.shape[0] > a.wk2.shape[0] ? a.wq2.shape[0] : a.wk2.shape[0];
  size.c = a.wq3.shape[0];
  return size;
}

// D [m, n] = relu(A [m, k] B [n, k]^T)
Gemm layer(const lemo_tensor& weight, int64_t m, const void* a, int64_t lda, void* d) {
  Gemm g = {};
  g.kind = GemmKind::kNT;
  g.dtype = weight.dtype;
  g.m = m, g.n = weight.shape[0], g.k = weight.shape[1];
  g.a = a, g.lda = lda;
  g.b = weight.data, g.ldb = row_stride(weight);
  g.d = d, g.ldd = g.n;
  g.relu = true;
  return g;
}

Workspace layout(const lemo_exec& exec, const lemo_predict_args& a, void* base) {
  const Sizes size = sizes_of(a);
  Arena arena(base);
  Workspace w = {};
  w.rstd = arena.take<float>(size.tokens);
  w.hidden = arena.take<uint16_t>(size.chunk * size.r);
  w.active = arena.take<uint16_t>(size.chunk * size.s);
  w.pooled = arena.take<float>(size.blocks * size.s);
  w.queries = arena.take<float>(size.blocks * size.c);
  w.keys = arena.take<float>(size.blocks * size.c);
  w.suffix = arena.take<float>(size.blocks * size.c);
  uint64_t bytes = 0;
  for (const lemo_tensor* weight : {&a.wq1, &a.wq2, &a.wk1, &a.wk2}) {
    const uint64_t needed = gemm_workspace(exec.device_index, layer(*weight, size.chunk, nullptr, 0, nullptr));
    bytes = needed > bytes ? needed : bytes;
  }
  w.gemm = arena.take<char>(static_cast<int64_t>(bytes));
  w.bytes = arena.size();
  return w;
}

void check_multiple(const char* name, int64_t size) {
  if (size > 0 && size % kVector == 0) return;
  throw Error(LEMO_UNSUPPORTED, std::string(name) + ": expected sizes that are multiples of 8 on CUDA, got " +
                                    std::to_string(size) + "; pad with zero rows");
}

void check_sizes(const lemo_predict_args& a) {
  check_width("x", a.x.shape[1]);
  check_multiple("wq1", a.wq1.shape[0]);
  check_multiple("wq2", a.wq2.shape[0]);
  check_multiple("wq3", a.wq3.shape[0]);
  check_multiple("wk1", a.wk1.shape[0]);
  check_multiple("wk2", a.wk2.shape[0]);
}

void network(const lemo_exec& exec, const lemo_predict_args& a, const lemo_tensor& w1, const lemo_tensor& w2,
             const lemo_tensor& w3, const Workspace& w, float* out) {
  const Sizes size = sizes_of(a);
  const cudaStream_t stream = stream_of(exec);
  const auto* offsets = data<int32_t>(a.blocks.offsets);
  for (int64_t first = 0; first < size.tokens; first += size.chunk) {
    const int64_t count = size.tokens - first < size.chunk ? size.tokens - first : size.chunk;
    const auto* x = data<uint16_t>(a.x) + first * row_stride(a.x);
    gemm(exec.device_index, stream, layer(w1, count, x, row_stride(a.x), w.hidden), w.gemm);
    gemm(exec.device_index, stream, layer(w2, count, w.hidden, w1.shape[0], w.active), w.gemm);
    pool(stream, a.x.dtype, a.pool == LEMO_POOL_MAX, w.active, w2.shape[0], w.rstd, offsets, size.blocks, first, count,
         w.pooled);
  }
  project(stream, w.pooled, size.blocks, w3, out);
}

}  // namespace

uint64_t predict_workspace(const lemo_exec& exec, const lemo_predict_args& a) {
  check_sizes(a);
  return layout(exec, a, nullptr).bytes;
}

void predict(const lemo_exec& exec, const lemo_predict_args& a) {
  check_sizes(a);
  const DeviceGuard guard(exec.device_index);
  const Sizes size = sizes_of(a);
  const cudaStream_t stream = stream_of(exec);
  const Workspace w = layout(exec, a, exec.workspace);
  row_scale(stream, a.x, a.norm == LEMO_NORM_LAYER, a.eps, w.rstd);
  network(exec, a, a.wq1, a.wq2, a.wq3, w, w.queries);
  network(exec, a, a.wk1, a.wk2, a.wk3, w, w.keys);
  if (present(a.queries)) copy_rows(stream, w.queries, size.blocks, size.c, a.queries);
  if (present(a.keys)) copy_rows(stream, w.keys, size.blocks, size.c, a.keys);
  column_sums(stream, w.queries, w.keys, w.suffix, data<int32_t>(a.blocks.documents), a.blocks.documents.shape[0] - 1,
              size.blocks, size.c, a.normalize != 0, data<float>(a.scores));
}

}  // namespace lemo::cuda
