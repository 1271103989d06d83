// Predicted block informativeness on the CPU: tokens in tiles through two small networks, pooled per block, then the
// column sums of the query-key products by a suffix sum per document.
#include <algorithm>
#include <cmath>
#include <vector>

#include "ref/ops.h"
#include "ref/parallel.h"
#include "ref/simd.h"
#include "ref/tiles.h"
#include "ref/view.h"

namespace lemo::ref {
namespace {

// W^T [in, padded out]: what the matrix kernel reads as its second operand.
struct Transposed {
  explicit Transposed(const lemo_tensor& w)
      : in(w.shape[1]), out(w.shape[0]), padded(round_up(w.shape[0], kLane)), data(static_cast<size_t>(in * padded)) {
    for (int64_t o = 0; o < out; ++o) {
      for (int64_t i = 0; i < in; ++i) data[i * padded + o] = row(w, o)[i];
    }
  }
  int64_t in, out, padded;
  std::vector<float> data;
};

// y [rows, w.padded] = relu(x [rows, w.in] w)
void relu_layer(const float* x, int64_t x_stride, int64_t rows, const Transposed& w, float* y) {
  simd().matmul(rows, w.padded, w.in, x, x_stride, 1, w.data.data(), w.padded, y, w.padded, false);
  for (int64_t i = 0; i < rows * w.padded; ++i) y[i] = y[i] < 0.0f ? 0.0f : y[i];
}

struct Network {
  Network(const lemo_tensor& a, const lemo_tensor& b, const lemo_tensor& c) : w1(a), w2(b), w3(c) {}

  // y [w3.out] of the block of tokens first .. last - 1. The networks have no biases, so relu(W (r x)) = r relu(W x)
  // for r > 0: the norm is applied to the last token-level layer.
  void block(const lemo_predict_args& a, const float* rstd, int64_t first, int64_t last, float* y) const {
    std::vector<float> hidden(static_cast<size_t>(kTile * w1.padded)), tokens(static_cast<size_t>(kTile * w2.padded));
    std::vector<float> pooled(static_cast<size_t>(w2.padded), 0.0f);
    for (int64_t t = first; t < last; t += kTile) {
      const int64_t rows = std::min(kTile, last - t);
      relu_layer(row(a.x, t), a.x.stride[0], rows, w1, hidden.data());
      relu_layer(hidden.data(), w1.padded, rows, w2, tokens.data());
      for (int64_t i = 0; i < rows; ++i) {
        float* v = tokens.data() + i * w2.padded;
        if (a.pool == LEMO_POOL_MEAN) {
          simd().add(w2.out, pooled.data(), v, rstd[t + i]);
        } else {
          // Written so that a NaN wins: selection must get to see it.
          for (int64_t c = 0; c < w2.out; ++c)
            pooled[c] = pooled[c] >= v[c] * rstd[t + i] ? pooled[c] : v[c] * rstd[t + i];
        }
      }
    }
    if (a.pool == LEMO_POOL_MEAN) simd().multiply(w2.out, pooled.data(), 1.0f / static_cast<float>(last - first));
    std::vector<float> out(static_cast<size_t>(w3.padded));
    simd().matmul(1, w3.padded, w3.in, pooled.data(), w2.padded, 1, w3.data.data(), w3.padded, out.data(), w3.padded,
                  false);
    std::copy(out.begin(), out.begin() + w3.out, y);
  }

  Transposed w1, w2, w3;
};

float reciprocal_deviation(const float* x, int64_t d, int32_t norm, float eps) {
  double sum = 0.0, squares = 0.0;
  for (int64_t c = 0; c < d; ++c) {
    sum += x[c];
    squares += static_cast<double>(x[c]) * x[c];
  }
  const double n = static_cast<double>(d);
  const double mean = norm == LEMO_NORM_LAYER ? sum / n : 0.0;
  return static_cast<float>(1.0 / std::sqrt(squares / n - mean * mean + eps));
}

}  // namespace

void predict(const lemo_exec& exec, const lemo_predict_args& a) {
  const int64_t tokens = a.x.shape[0], num_blocks = a.blocks.offsets.shape[0] - 1, width = a.wq3.shape[0];
  const int32_t *offsets = ints(a.blocks.offsets), *documents = ints(a.blocks.documents);
  std::vector<float> rstd(static_cast<size_t>(tokens));
  const Network query(a.wq1, a.wq2, a.wq3), key(a.wk1, a.wk2, a.wk3);
  std::vector<float> queries(static_cast<size_t>(num_blocks * width)), keys(queries.size());
  parallel_for(exec, num_blocks, [&](int64_t n) {
    for (int64_t t = offsets[n]; t < offsets[n + 1]; ++t) {
      rstd[t] = reciprocal_deviation(row(a.x, t), a.x.shape[1], a.norm, a.eps);
    }
    query.block(a, rstd.data(), offsets[n], offsets[n + 1], queries.data() + n * width);
    key.block(a, rstd.data(), offsets[n], offsets[n + 1], keys.data() + n * width);
  });
  std::vector<double> suffix(static_cast<size_t>(width));
  for (int64_t d = 0; d + 1 < a.blocks.documents.shape[0]; ++d) {
    std::fill(suffix.begin(), suffix.end(), 0.0);
    for (int64_t n = documents[d + 1] - 1; n >= documents[d]; --n) {
      double score = 0.0;
      for (int64_t c = 0; c < width; ++c) {
        suffix[c] += queries[n * width + c];
        score += suffix[c] * keys[n * width + c];
      }
      floats(a.scores)[n] = static_cast<float>(a.normalize ? score / static_cast<double>(documents[d + 1] - n) : score);
    }
  }
  for (int64_t n = 0; n < num_blocks; ++n) {
    if (present(a.queries)) std::copy_n(queries.data() + n * width, width, row(a.queries, n));
    if (present(a.keys)) std::copy_n(keys.data() + n * width, width, row(a.keys, n));
  }
}

uint64_t predict_workspace(const lemo_exec&, const lemo_predict_args&) { return 0; }

}  // namespace lemo::ref
