// Predicted informativeness. The networks run in chunks of tokens: two tensor-core products with ReLU in the epilogue
// (the first of both networks in one), then pooling into float32 [num_blocks, s]. ReLU networks without biases are
// positively homogeneous, so the norm's 1/r is applied to the pooled activations and x is read as it is.
#include "common/check.h"
#include "common/gemm.h"
#include "kernels.h"
#include "predict/pool.h"
#include "rows/rows.cuh"

namespace lemo::cuda {
namespace {

constexpr int64_t kChunkTokens = 16384;             // chunks are multiples of this,
constexpr int64_t kChunkBytes = int64_t{64} << 20;  // as many as keep the activations near this

struct Sizes {
  int64_t tokens, chunk, blocks, rq, rk, sq, sk, c;
  int64_t s;  // the wider of sq and sk
};

Sizes sizes_of(const lemo_predict_args& a) {
  Sizes size = {};
  size.tokens = a.x.shape[0];
  size.blocks = a.blocks.offsets.shape[0] - 1;
  size.rq = a.wq1.shape[0], size.rk = a.wk1.shape[0];
  size.sq = a.wq2.shape[0], size.sk = a.wk2.shape[0];
  size.c = a.wq3.shape[0];
  size.s = size.sq > size.sk ? size.sq : size.sk;
  const int64_t bytes = 2 * (size.rq + size.rk + size.s);  // per token
  size.chunk = kChunkBytes / bytes / kChunkTokens * kChunkTokens;
  if (size.chunk < kChunkTokens) size.chunk = kChunkTokens;
  if (size.chunk > size.tokens) size.chunk = size.tokens;
  return size;
}

struct Workspace {
  float* rstd;       // [T]
  uint16_t* w1;      // [rq + rk, d]: wq1 above wk1, unless the caller has them so
  uint16_t* hidden;  // [chunk, rq + rk]: the first layers of both networks side by side
  uint16_t* active;  // [chunk, s]: the second layer of one network
  float* pooled_q;   // [num_blocks, sq]
  float* pooled_k;   // [num_blocks, sk]
  float* queries;    // [num_blocks, c]
  float* keys;       // [num_blocks, c]
  float* suffix;     // [num_blocks, c]
  void* gemm;
  uint64_t bytes;
};

// D [m, n] = relu(A [m, k] W [n, k]^T)
Gemm layer(const lemo_tensor& weight, int64_t n, int64_t m, const void* a, int64_t lda, void* d, int64_t ldd) {
  Gemm g = {};
  g.kind = GemmKind::kNT;
  g.dtype = weight.dtype;
  g.m = m, g.n = n, g.k = weight.shape[1];
  g.a = a, g.lda = lda;
  g.b = weight.data, g.ldb = row_stride(weight);
  g.d = d, g.ldd = ldd;
  g.relu = true;
  return g;
}

// Whether wk1 follows wq1 in memory, as when both are slices of one matrix. One product then reads x once for both; the
// other weights are copied together first, a few megabytes against the hundreds of x.
bool stacked(const lemo_predict_args& a) {
  return row_stride(a.wq1) == row_stride(a.wk1) &&
         data<uint16_t>(a.wk1) == data<uint16_t>(a.wq1) + a.wq1.shape[0] * row_stride(a.wq1);
}

Workspace layout(const lemo_exec& exec, const lemo_predict_args& a, void* base) {
  const Sizes size = sizes_of(a);
  const int64_t r = size.rq + size.rk;
  Arena arena(base);
  Workspace w = {};
  w.rstd = arena.take<float>(size.tokens);
  w.w1 = arena.take<uint16_t>(Size(r) * a.x.shape[1]);
  w.hidden = arena.take<uint16_t>(Size(size.chunk) * r);
  w.active = arena.take<uint16_t>(Size(size.chunk) * size.s);
  w.pooled_q = arena.take<float>(Size(size.blocks) * size.sq);
  w.pooled_k = arena.take<float>(Size(size.blocks) * size.sk);
  w.queries = arena.take<float>(Size(size.blocks) * size.c);
  w.keys = arena.take<float>(Size(size.blocks) * size.c);
  w.suffix = arena.take<float>(Size(size.blocks) * size.c);
  uint64_t bytes = 0;
  const auto need = [&](const lemo_tensor& weight, int64_t n) {
    const Gemm g = layer(weight, n, size.chunk, nullptr, 0, nullptr, 0);
    const uint64_t needed = gemm_workspace(exec.device_index, g);
    bytes = needed > bytes ? needed : bytes;
  };
  need(a.wq1, r);
  need(a.wq2, size.sq);
  need(a.wk2, size.sk);
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
  check_multiple("wq1", a.wq1.shape[0]);
  check_multiple("wq2", a.wq2.shape[0]);
  check_multiple("wq3", a.wq3.shape[0]);
  check_multiple("wk1", a.wk1.shape[0]);
  check_multiple("wk2", a.wk2.shape[0]);
}

// Both first matrices as one, [rq + rk, d].
lemo_tensor first_layers(const lemo_exec& exec, const lemo_predict_args& a, const Workspace& w) {
  lemo_tensor both = a.wq1;
  both.shape[0] += a.wk1.shape[0];
  if (stacked(a)) return both;
  both.data = w.w1;
  both.stride[0] = a.x.shape[1];
  const uint64_t width = a.x.shape[1] * sizeof(uint16_t);
  uint16_t* to = w.w1;
  for (const lemo_tensor* from : {&a.wq1, &a.wk1}) {
    check(cudaMemcpy2DAsync(to, width, from->data, row_stride(*from) * sizeof(uint16_t), width, from->shape[0],
                            cudaMemcpyDeviceToDevice, stream_of(exec)),
          "predict: first layers");
    to += from->shape[0] * a.x.shape[1];
  }
  return both;
}

void networks(const lemo_exec& exec, const lemo_predict_args& a, const Workspace& w) {
  const Sizes size = sizes_of(a);
  const int64_t r = size.rq + size.rk;
  const cudaStream_t stream = stream_of(exec);
  const auto* offsets = data<int32_t>(a.blocks.offsets);
  const lemo_tensor w1 = first_layers(exec, a, w);
  for (int64_t first = 0; first < size.tokens; first += size.chunk) {
    const int64_t count = size.tokens - first < size.chunk ? size.tokens - first : size.chunk;
    const int64_t ldx = row_stride(a.x);
    const auto* x = data<uint16_t>(a.x) + first * ldx;
    const auto multiply = [&](const Gemm& g) { gemm(exec.device_index, stream, g, w.gemm); };
    const auto second = [&](const lemo_tensor& w2, const uint16_t* hidden, float* pooled) {
      multiply(layer(w2, w2.shape[0], count, hidden, r, w.active, w2.shape[0]));
      pool(stream, {a.x.dtype, a.pool == LEMO_POOL_MAX, w.active, w2.shape[0], w.rstd, offsets, size.blocks, first,
                    count, pooled});
    };
    multiply(layer(w1, r, count, x, ldx, w.hidden, r));
    second(a.wq2, w.hidden, w.pooled_q);
    second(a.wk2, w.hidden + size.rq, w.pooled_k);
  }
  project(stream, w.pooled_q, size.blocks, a.wq3, w.queries);
  project(stream, w.pooled_k, size.blocks, a.wk3, w.keys);
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
  networks(exec, a, w);
  if (present(a.queries)) copy_rows(stream, w.queries, size.blocks, size.c, a.queries);
  if (present(a.keys)) copy_rows(stream, w.keys, size.blocks, size.c, a.keys);
  column_sums(stream, {w.queries, w.keys, w.suffix, data<int32_t>(a.blocks.documents), a.blocks.documents.shape[0] - 1,
                       size.blocks, size.c, a.normalize != 0, data<float>(a.scores)});
}

}  // namespace lemo::cuda
