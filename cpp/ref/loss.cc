// Output projection and cross-entropy over segments of the tokens that count: ignored tokens cost nothing.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "ref/gemm.h"
#include "ref/ops.h"
#include "ref/parallel.h"
#include "ref/simd.h"
#include "ref/view.h"

namespace lemo::ref {
namespace {

constexpr int64_t kGrain = 8;
constexpr int64_t kSegmentFloats = int64_t{32} << 20;  // 128 MiB of logits
constexpr int64_t kSegmentRows = 960;                  // more rows do not make the matrix products faster

struct Sizes {
  explicit Sizes(const lemo_linear_cross_entropy_args& a)
      : d(a.hidden.shape[1]),
        classes(a.weight.shape[0]),
        rank(present(a.lora_a) ? a.lora_a.shape[0] : 0),
        gradients(present(a.dhidden) || present(a.dweight) || present(a.dbias) || present(a.dlora_a) ||
                  present(a.dlora_b)) {
    const int64_t chosen = std::clamp<int64_t>(kSegmentFloats / classes, 1, kSegmentRows);
    rows = std::max<int64_t>(1, std::min<int64_t>(a.hidden.shape[0], a.segment_rows > 0 ? a.segment_rows : chosen));
  }
  int64_t d;
  int64_t classes;
  int64_t rank;
  bool gradients;
  int64_t rows;  // of a segment
  Size total_floats() const { return (Size(2) * d + classes + Size(2) * rank) * rows; }
  Size product_floats() const {
    const int64_t longest = std::max({rows, d, classes, rank});
    return gemm_floats(longest, longest, longest);
  }
};

struct Buffers {
  Buffers(float* workspace, const Sizes& s)
      : hidden(workspace),
        dhidden(hidden + s.rows * s.d),
        logits(dhidden + s.rows * s.d),
        low(logits + s.rows * s.classes),
        dlow(low + s.rows * s.rank) {}
  float* hidden;   // [rows, d]: the tokens that count
  float* dhidden;  // [rows, d]
  float* logits;   // [rows, V], then their gradient
  float* low;      // [rows, r]: lora_scale h A^T
  float* dlow;     // [rows, r]
};

// Replaces the logits of one token by their gradient (if wanted) and returns the token's loss. `slope` holds a float
// per class if a soft cap has a gradient.
double token_loss(const lemo_linear_cross_entropy_args& a, const Sizes& s, float* z, int64_t target, float factor,
                  float* slope) {
  const Simd& f = simd();
  if (present(a.bias)) f.add(s.classes, z, floats(a.bias), 1.0f);
  if (a.softcap > 0) {
    for (int64_t v = 0; v < s.classes; ++v) {
      const float t = std::tanh(z[v] / a.softcap);
      z[v] = a.softcap * t;
      if (s.gradients) slope[v] = 1.0f - t * t;
    }
  }
  const float highest = f.max(s.classes, z);
  const float at_target = z[target];
  const float total = f.exp_sum(s.classes, z, 1.0f, highest);
  const double loss = static_cast<double>(highest) - at_target + std::log(static_cast<double>(total));
  if (!s.gradients) return loss;
  f.multiply(s.classes, z, factor / total);
  z[target] -= factor;
  if (a.softcap > 0) {
    for (int64_t v = 0; v < s.classes; ++v) z[v] *= slope[v];
  }
  return loss;
}

void add_column_sums(const lemo_exec& exec, int64_t rows, int64_t columns, const float* x, float* sums) {
  parallel_ranges(exec, columns, 1024, [&](int64_t first, int64_t last) {
    for (int64_t i = 0; i < rows; ++i) simd().add(last - first, sums + first, x + i * columns + first, 1.0f);
  });
}

// Gradients of one segment from the gradient of its logits.
void segment_gradients(const lemo_exec& exec, const Scratch& scratch, const lemo_linear_cross_entropy_args& a,
                       const Sizes& s, const Buffers& b, int64_t n) {
  const Matrix dz = matrix(b.logits, s.classes);
  const Matrix dz_transposed = transposed(b.logits, s.classes);
  const Matrix hidden = matrix(b.hidden, s.d);
  if (present(a.dweight)) {
    gemm(exec, scratch, s.classes, s.d, n, dz_transposed, hidden, floats(a.dweight), a.dweight.stride[0], true);
  }
  if (present(a.dbias)) add_column_sums(exec, n, s.classes, b.logits, floats(a.dbias));
  if (present(a.dlora_b)) {
    gemm(exec, scratch, s.classes, s.rank, n, dz_transposed, matrix(b.low, s.rank), floats(a.dlora_b),
         a.dlora_b.stride[0], true);
  }
  if (present(a.dhidden)) {
    gemm(exec, scratch, n, s.d, s.classes, dz, matrix(floats(a.weight), a.weight.stride[0]), b.dhidden, s.d, false);
  }
  if (s.rank == 0 || (!present(a.dlora_a) && !present(a.dhidden))) return;
  gemm(exec, scratch, n, s.rank, s.classes, dz, matrix(floats(a.lora_b), a.lora_b.stride[0]), b.dlow, s.rank, false);
  simd().multiply(n * s.rank, b.dlow, a.lora_scale);
  if (present(a.dlora_a)) {
    gemm(exec, scratch, s.rank, s.d, n, transposed(b.dlow, s.rank), hidden, floats(a.dlora_a), a.dlora_a.stride[0],
         true);
  }
  if (present(a.dhidden)) {
    gemm(exec, scratch, n, s.d, s.rank, matrix(b.dlow, s.rank), matrix(floats(a.lora_a), a.lora_a.stride[0]), b.dhidden,
         s.d, true);
  }
}

void clear(const lemo_tensor& t) {
  if (!present(t)) return;
  const int64_t rows = t.ndim == 2 ? t.shape[0] : 1;
  for (int64_t i = 0; i < rows; ++i) std::fill_n(row(t, i), t.shape[t.ndim - 1], 0.0f);
}

}  // namespace

void linear_cross_entropy(const lemo_exec& exec, const lemo_linear_cross_entropy_args& a) {
  const Sizes s(a);
  const Buffers b(static_cast<float*>(exec.workspace), s);
  const auto* targets = static_cast<const int64_t*>(a.targets.data);
  std::vector<int64_t> counted;
  for (int64_t i = 0; i < a.hidden.shape[0]; ++i) {
    if (targets[i] != a.ignore_index) counted.push_back(i);
  }
  const auto num_counted = static_cast<int64_t>(counted.size());
  std::vector<double> losses(static_cast<size_t>(num_counted));
  const Scratch scratch(exec, INT64_MAX, "weight", s.product_floats());
  const Scratch slopes(exec, s.rows, "weight", s.gradients && a.softcap > 0 ? s.classes : 0);

  // All memory has been taken: from here on outputs are written.
  if (present(a.dhidden)) {
    for (int64_t i = 0; i < a.hidden.shape[0]; ++i) {
      if (targets[i] == a.ignore_index) std::fill_n(row(a.dhidden, i), s.d, 0.0f);
    }
  }
  clear(a.dweight);
  clear(a.dbias);
  clear(a.dlora_a);
  clear(a.dlora_b);
  const double divisor =
      a.reduction == LEMO_REDUCE_MEAN ? std::max<double>(1.0, static_cast<double>(num_counted)) : 1.0;
  const auto factor = static_cast<float>(1.0 / divisor);
  for (int64_t first = 0; first < num_counted; first += s.rows) {
    const int64_t n = std::min(s.rows, num_counted - first);
    const int64_t* tokens = counted.data() + first;
    for (int64_t i = 0; i < n; ++i) {
      std::memcpy(b.hidden + i * s.d, row(a.hidden, tokens[i]), static_cast<size_t>(s.d) * sizeof(float));
    }
    gemm(exec, scratch, n, s.classes, s.d, matrix(b.hidden, s.d), transposed(floats(a.weight), a.weight.stride[0]),
         b.logits, s.classes, false);
    if (s.rank > 0) {
      gemm(exec, scratch, n, s.rank, s.d, matrix(b.hidden, s.d), transposed(floats(a.lora_a), a.lora_a.stride[0]),
           b.low, s.rank, false);
      simd().multiply(n * s.rank, b.low, a.lora_scale);
      gemm(exec, scratch, n, s.classes, s.rank, matrix(b.low, s.rank), transposed(floats(a.lora_b), a.lora_b.stride[0]),
           b.logits, s.classes, true);
    }
    parallel_ranges(exec, n, kGrain, [&](int64_t begin, int64_t end, int worker) {
      for (int64_t i = begin; i < end; ++i) {
        losses[static_cast<size_t>(first + i)] =
            token_loss(a, s, b.logits + i * s.classes, targets[tokens[i]], factor, slopes.of(worker));
      }
    });
    if (!s.gradients) continue;
    segment_gradients(exec, scratch, a, s, b, n);
    if (!present(a.dhidden)) continue;
    for (int64_t i = 0; i < n; ++i) {
      std::memcpy(row(a.dhidden, tokens[i]), b.dhidden + i * s.d, static_cast<size_t>(s.d) * sizeof(float));
    }
  }
  double loss = 0;
  for (const double token : losses) loss += token;
  floats(a.loss)[0] = static_cast<float>(loss / divisor);
  static_cast<int64_t*>(a.valid.data)[0] = num_counted;
}

uint64_t linear_cross_entropy_workspace(const lemo_exec&, const lemo_linear_cross_entropy_args& a) {
  return Sizes(a).total_floats().floats("hidden, weight, lora_a");
}

}  // namespace lemo::ref
