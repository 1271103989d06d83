// Predicted block informativeness. The token-level layers are matrix products; what follows them is small:
//   row_scale    1 / deviation of every token. The networks have no biases, so relu(W (r x)) = r relu(W x) for r > 0
//                and the scale is applied where tokens are pooled: x is read by the product as it lies
//   pool_blocks  one CTA per block: scaled mean or max over its tokens, then the block-level layer
//   suffix_sums  per document and channel, sums of the queries from the last block back
//   score_blocks one warp per block: suffix sum times key = the column sum; no block x block matrix
#include <algorithm>
#include <string>
#include <utility>

#include "cuda/common/check.h"
#include "cuda/common/gemm.h"
#include "cuda/common/vector.cuh"
#include "cuda/kernels.h"

namespace lemo::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

// One warp per row of x [rows, d], d a multiple of 8.
template <class T>
__global__ void row_scale(const T* x, int64_t stride, int64_t rows, int d, bool layer, float eps, float* scale) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (i >= rows) return;
  const T* row = x + i * stride;
  float mean = 0.0f;
  float v[kVector];
  if (layer) {  // about the mean, in a second pass over a row that is in the cache: no cancellation
    for (int c = lane; c < d / kVector; c += kWarp) {
      to_float<T>(load_raw(row, c), v);
#pragma unroll
      for (int e = 0; e < kVector; ++e) mean += v[e];
    }
    mean = warp_sum(mean) / d;
  }
  float squares = 0.0f;
  for (int c = lane; c < d / kVector; c += kWarp) {
    to_float<T>(load_raw(row, c), v);
#pragma unroll
    for (int e = 0; e < kVector; ++e) squares += (v[e] - mean) * (v[e] - mean);
  }
  squares = warp_sum(squares);
  if (lane == 0) scale[i] = rsqrtf(squares / d + eps);
}

template <class T>
struct Pooling {
  const T* hidden;  // [T, s]
  const float* scale;
  const int32_t* offsets;
  const T* w;  // [c, s]
  int64_t w_stride;
  int s, c;
  bool mean;
  float* out;    // [nb, c]
  float* extra;  // the same for the caller, or null
  int64_t extra_stride;
};

template <class T>
__global__ void __launch_bounds__(kThreads) pool_blocks(Pooling<T> p) {
  extern __shared__ float pooled[];
  const int64_t block = blockIdx.x;
  const int first = p.offsets[block], last = p.offsets[block + 1];
  for (int c = threadIdx.x; c < p.s; c += kThreads) {
    float value = 0.0f;  // every term is a relu: 0 is also the start of the maximum
    for (int t = first; t < last; ++t) {
      const float x = p.scale[t] * static_cast<float>(p.hidden[static_cast<int64_t>(t) * p.s + c]);
      if (p.mean) {
        value += x;
      } else {
        value = value >= x ? value : x;  // a NaN wins: selection must get to see it
      }
    }
    pooled[c] = p.mean ? value / static_cast<float>(last - first) : value;
  }
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  for (int o = threadIdx.x / kWarp; o < p.c; o += kThreads / kWarp) {
    float sum = 0.0f;
    for (int i = lane; i < p.s; i += kWarp) sum += pooled[i] * static_cast<float>(p.w[o * p.w_stride + i]);
    sum = warp_sum(sum);
    if (lane == 0) {
      p.out[block * p.c + o] = sum;
      if (p.extra) p.extra[block * p.extra_stride + o] = sum;
    }
  }
}

// In place: queries[n] = sum over m >= n of queries[m] within the document of blockIdx.x.
__global__ void suffix_sums(float* queries, const int32_t* documents, int c) {
  constexpr int kAhead = 8;  // loads in flight: they do not depend on the running sum
  const int first = documents[blockIdx.x], last = documents[blockIdx.x + 1];
  for (int channel = threadIdx.x; channel < c; channel += blockDim.x) {
    float sum = 0.0f;
    for (int n = last; n > first; n -= kAhead) {
      float x[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        x[i] = n - 1 - i >= first ? queries[static_cast<int64_t>(n - 1 - i) * c + channel] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        sum += x[i];
        if (n - 1 - i >= first) queries[static_cast<int64_t>(n - 1 - i) * c + channel] = sum;
      }
    }
  }
}

__global__ void score_blocks(const float* sums, const float* keys, const int32_t* documents, int num_documents,
                             int num_blocks, int c, bool normalize, float* scores) {
  const int n = (blockIdx.x * blockDim.x + threadIdx.x) / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (n >= num_blocks) return;
  float score = 0.0f;
  for (int i = lane; i < c; i += kWarp) {
    score += sums[static_cast<int64_t>(n) * c + i] * keys[static_cast<int64_t>(n) * c + i];
  }
  score = warp_sum(score);
  if (lane != 0) return;
  int low = 0, high = num_documents;  // documents[low] <= n < documents[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (documents[middle] <= n ? low : high) = middle;
  }
  scores[n] = normalize ? score / static_cast<float>(documents[high] - n) : score;
}

struct Workspace {
  Workspace(const lemo_exec& exec, const lemo_predict_args& a, void* base) {
    Arena arena(base);
    const int64_t tokens = a.x.shape[0], num_blocks = a.blocks.offsets.shape[0] - 1, c = a.wq3.shape[0];
    const int64_t r = std::max(a.wq1.shape[0], a.wk1.shape[0]), s = std::max(a.wq2.shape[0], a.wk2.shape[0]);
    scale = arena.take<float>(tokens);
    first = arena.take<uint16_t>(tokens * r);
    second = arena.take<uint16_t>(tokens * s);
    queries = arena.take<float>(num_blocks * c);
    keys = arena.take<float>(num_blocks * c);
    uint64_t products = 0;
    for (const auto& weights : {std::pair{&a.wq1, &a.wq2}, std::pair{&a.wk1, &a.wk2}}) {
      for (const Gemm& g : {layer1(a, *weights.first), layer2(a, *weights.second)}) {
        products = std::max(products, gemm_workspace(exec.device_index, g));
      }
    }
    gemm = arena.take<char>(static_cast<int64_t>(products));
    size = arena.size();
  }

  // hidden = relu(x W1^T)
  Gemm layer1(const lemo_predict_args& a, const lemo_tensor& w) const {
    return product(a.x.dtype, a.x.shape[0], w, a.x.data, row_stride(a.x), first);
  }
  // tokens = relu(hidden W2^T)
  Gemm layer2(const lemo_predict_args& a, const lemo_tensor& w) const {
    return product(a.x.dtype, a.x.shape[0], w, first, w.shape[1], second);
  }

  float *scale, *queries, *keys;
  uint16_t *first, *second;
  char* gemm;
  uint64_t size;

 private:
  static Gemm product(int32_t dtype, int64_t rows, const lemo_tensor& w, const void* x, int64_t stride, void* y) {
    Gemm g{};
    g.kind = GemmKind::kNT;
    g.dtype = dtype;
    g.m = rows;
    g.n = w.shape[0];
    g.k = w.shape[1];
    g.a = x;
    g.lda = stride;
    g.b = w.data;
    g.ldb = row_stride(w);
    g.d = y;
    g.ldd = w.shape[0];
    g.alpha = 1.0f;
    g.relu = true;
    return g;
  }
};

void check_sizes(const lemo_predict_args& a) {
  const struct {
    const char* name;
    const lemo_tensor& w;
  } weights[] = {{"wq1", a.wq1}, {"wq2", a.wq2}, {"wq3", a.wq3}, {"wk1", a.wk1}, {"wk2", a.wk2}, {"wk3", a.wk3}};
  for (const auto& [name, w] : weights) {
    if (w.shape[0] % 8 != 0 || w.shape[1] % 8 != 0) {
      throw Error(LEMO_INVALID_ARGUMENT, std::string(name) + ": expected sizes that are multiples of 8 on CUDA, got [" +
                                             std::to_string(w.shape[0]) + ", " + std::to_string(w.shape[1]) +
                                             "]; pad with zero rows and columns");
    }
  }
}

template <class T>
void run(const lemo_exec& exec, const lemo_predict_args& a) {
  const cudaStream_t stream = stream_of(exec);
  const Workspace w(exec, a, exec.workspace);
  const int64_t tokens = a.x.shape[0], num_blocks = a.blocks.offsets.shape[0] - 1;
  const int num_documents = static_cast<int>(a.blocks.documents.shape[0] - 1), c = static_cast<int>(a.wq3.shape[0]);
  const auto* documents = data<const int32_t>(a.blocks.documents);

  row_scale<T><<<static_cast<unsigned>(ceil_div(tokens * kWarp, kThreads)), kThreads, 0, stream>>>(
      data<const T>(a.x), row_stride(a.x), tokens, static_cast<int>(a.x.shape[1]), a.norm == LEMO_NORM_LAYER, a.eps,
      w.scale);
  check_launch("predict: row_scale");
  const auto network = [&](const lemo_tensor& w1, const lemo_tensor& w2, const lemo_tensor& w3, float* out,
                           const lemo_tensor& extra) {
    gemm(exec.device_index, stream, w.layer1(a, w1), w.gemm);
    gemm(exec.device_index, stream, w.layer2(a, w2), w.gemm);
    Pooling<T> p{};
    p.hidden = reinterpret_cast<const T*>(w.second);
    p.scale = w.scale;
    p.offsets = data<const int32_t>(a.blocks.offsets);
    p.w = data<const T>(w3);
    p.w_stride = row_stride(w3);
    p.s = static_cast<int>(w2.shape[0]);
    p.c = c;
    p.mean = a.pool == LEMO_POOL_MEAN;
    p.out = out;
    p.extra = data<float>(extra);
    p.extra_stride = present(extra) ? extra.stride[0] : 0;
    pool_blocks<T><<<static_cast<unsigned>(num_blocks), kThreads, sizeof(float) * p.s, stream>>>(p);
    check_launch("predict: pool_blocks");
  };
  network(a.wq1, a.wq2, a.wq3, w.queries, a.queries);
  network(a.wk1, a.wk2, a.wk3, w.keys, a.keys);
  suffix_sums<<<static_cast<unsigned>(num_documents), static_cast<unsigned>(std::min(c, 1024)), 0, stream>>>(
      w.queries, documents, c);
  check_launch("predict: suffix_sums");
  score_blocks<<<static_cast<unsigned>(ceil_div(num_blocks * kWarp, kThreads)), kThreads, 0, stream>>>(
      w.queries, w.keys, documents, num_documents, static_cast<int>(num_blocks), c, a.normalize != 0,
      data<float>(a.scores));
  check_launch("predict: score_blocks");
}

}  // namespace

void predict(const lemo_exec& exec, const lemo_predict_args& a) {
  check_sizes(a);
  const DeviceGuard guard(exec.device_index);
  dispatch_dtype(a.x.dtype, [&](auto type) { run<decltype(type)>(exec, a); });
}

uint64_t predict_workspace(const lemo_exec& exec, const lemo_predict_args& a) {
  check_sizes(a);
  return Workspace(exec, a, nullptr).size;
}

}  // namespace lemo::cuda
