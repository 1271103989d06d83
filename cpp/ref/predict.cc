// The predictors: two low-rank networks per token, pooled per block. A task owns a run of whole blocks.
#include <algorithm>
#include <cmath>
#include <vector>

#include "ref/gemm.h"
#include "ref/ops.h"
#include "ref/parallel.h"
#include "ref/simd.h"
#include "ref/view.h"

namespace lemo::ref {
namespace {

constexpr int64_t kTaskTokens = 480;

// NaN stays NaN, so that it reaches the scores.
float relu(float x) { return x < 0 ? 0.0f : x; }

float inverse_deviation(int64_t d, const float* x, int32_t norm, float eps, std::vector<float>& centered) {
  const float* values = x;
  if (norm == LEMO_NORM_LAYER) {
    const float mean = simd().sum(d, x) / static_cast<float>(d);
    centered.resize(static_cast<size_t>(d));
    for (int64_t j = 0; j < d; ++j) centered[static_cast<size_t>(j)] = x[j] - mean;
    values = centered.data();
  }
  return 1.0f / std::sqrt(simd().dot(d, values, values) / static_cast<float>(d) + eps);
}

Matrix weights(const lemo_tensor& w) { return transposed(floats(w), w.stride[0]); }

// Block vectors y [last - first, c] of blocks [first, last).
void network(const lemo_predict_args& a, const lemo_tensor& w1, const lemo_tensor& w2, const lemo_tensor& w3,
             const std::vector<float>& deviations, int64_t first, int64_t last, float* out) {
  const int32_t* offsets = ints(a.blocks.offsets);
  const int64_t start = offsets[first];
  const int64_t tokens = offsets[last] - start;
  const int64_t r = w1.shape[0];
  const int64_t s = w2.shape[0];
  const int64_t c = w3.shape[0];
  const Size floats = (Size(r) + s) * tokens + Size(last - first) * s;
  std::vector<float> buffer(static_cast<size_t>(floats.count("wq1, wq2, wk1, wk2")));
  float* hidden = buffer.data();
  float* active = hidden + tokens * r;
  float* pooled = active + tokens * s;
  gemm_serial(tokens, r, a.x.shape[1], matrix(row(a.x, start), a.x.stride[0]), weights(w1), hidden, r, false);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t j = 0; j < r; ++j) hidden[t * r + j] = relu(hidden[t * r + j] * deviations[static_cast<size_t>(t)]);
  }
  gemm_serial(tokens, s, r, matrix(hidden, r), weights(w2), active, s, false);
  for (int64_t n = first; n < last; ++n) {
    float* p = pooled + (n - first) * s;  // starts at 0, also the smallest value of a unit
    for (int64_t t = offsets[n] - start; t < offsets[n + 1] - start; ++t) {
      for (int64_t j = 0; j < s; ++j) {
        const float value = relu(active[t * s + j]);
        if (a.pool == LEMO_POOL_MEAN) {
          p[j] += value;
        } else if (value > p[j] || value != value) {
          p[j] = value;
        }
      }
    }
    if (a.pool == LEMO_POOL_MEAN) simd().multiply(s, p, 1.0f / static_cast<float>(offsets[n + 1] - offsets[n]));
  }
  gemm_serial(last - first, c, s, matrix(pooled, s), weights(w3), out, c, false);
}

}  // namespace

void predict(const lemo_exec& exec, const lemo_predict_args& a) {
  const int64_t d = a.x.shape[1];
  const int64_t c = a.wq3.shape[0];
  const int32_t* offsets = ints(a.blocks.offsets);
  const int32_t* documents = ints(a.blocks.documents);
  const int64_t num_blocks = a.blocks.offsets.shape[0] - 1;
  auto* queries = static_cast<float*>(exec.workspace);  // [num_blocks, c]
  float* keys = queries + num_blocks * c;
  const int64_t grain = std::max<int64_t>(1, kTaskTokens / a.blocks.block_size);
  std::vector<double> suffix(static_cast<size_t>(c));
  // Tasks write to the workspace only, so that one of them may run out of memory.
  parallel_ranges(exec, num_blocks, grain, [&](int64_t first, int64_t last) {
    std::vector<float> deviations;
    std::vector<float> centered;
    for (int64_t t = offsets[first]; t < offsets[last]; ++t) {
      deviations.push_back(inverse_deviation(d, row(a.x, t), a.norm, a.eps, centered));
    }
    network(a, a.wq1, a.wq2, a.wq3, deviations, first, last, queries + first * c);
    network(a, a.wk1, a.wk2, a.wk3, deviations, first, last, keys + first * c);
  });
  for (int64_t n = 0; n < num_blocks; ++n) {
    if (present(a.queries)) std::copy_n(queries + n * c, c, row(a.queries, n));
    if (present(a.keys)) std::copy_n(keys + n * c, c, row(a.keys, n));
  }

  // sum over m >= n of yq_m . yk_n = (sum over m >= n of yq_m) . yk_n
  for (int64_t doc = 0; doc + 1 < a.blocks.documents.shape[0]; ++doc) {
    std::fill(suffix.begin(), suffix.end(), 0.0);
    for (int64_t n = documents[doc + 1] - 1; n >= documents[doc]; --n) {
      double score = 0;
      for (int64_t j = 0; j < c; ++j) {
        suffix[static_cast<size_t>(j)] += queries[n * c + j];
        score += suffix[static_cast<size_t>(j)] * keys[n * c + j];
      }
      if (a.normalize != 0) score /= static_cast<double>(documents[doc + 1] - n);
      floats(a.scores)[n] = static_cast<float>(score);
    }
  }
}

uint64_t predict_workspace(const lemo_exec&, const lemo_predict_args& a) {
  return (Size(2) * (a.blocks.offsets.shape[0] - 1) * a.wq3.shape[0]).floats("offsets, wq3");
}

}  // namespace lemo::ref
