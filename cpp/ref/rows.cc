#include <algorithm>
#include <cmath>
#include <cstring>

#include "ref/ops.h"
#include "ref/parallel.h"
#include "ref/simd.h"
#include "ref/view.h"

namespace lemo::ref {
namespace {

constexpr int64_t kGrain = 32;  // rows per task

// The row behind packed row i; without a list, row i itself.
int64_t source(const int32_t* rows, int64_t i) { return rows == nullptr ? i : rows[i]; }

struct Statistics {
  float mean;
  float rstd;
};

Statistics statistics(int64_t d, const float* s, int32_t norm, float eps, float* centered) {
  const Simd& f = simd();
  float mean = 0;
  const float* values = s;
  if (norm == LEMO_NORM_LAYER) {
    mean = f.sum(d, s) / static_cast<float>(d);
    for (int64_t j = 0; j < d; ++j) centered[j] = s[j] - mean;
    values = centered;
  }
  return {mean, 1.0f / std::sqrt(f.dot(d, values, values) / static_cast<float>(d) + eps)};
}

}  // namespace

void gather(const lemo_exec& exec, const lemo_gather_args& a) {
  const int64_t d = a.x.shape[1];
  const int32_t* rows = ints(a.rows);
  const int32_t* slots = ints(a.slots);
  const float* weights = floats(a.weights);
  parallel_ranges(exec, a.out.shape[0], kGrain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      float* out = row(a.out, i);
      const int64_t from = source(rows, i);
      if (from < 0) {
        std::fill_n(out, d, 0.0f);
        continue;
      }
      const float* x = row(a.x, from);
      if (weights == nullptr) {
        std::memcpy(out, x, static_cast<size_t>(d) * sizeof(float));
      } else {
        const float weight = weights[slots[i]];
        for (int64_t j = 0; j < d; ++j) out[j] = weight * x[j];
      }
    }
  });
}

void scatter_add(const lemo_exec& exec, const lemo_scatter_add_args& a) {
  const int64_t d = a.x.shape[1];
  const int32_t* rows = ints(a.rows);
  parallel_ranges(exec, a.y.shape[0], kGrain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t to = source(rows, i);
      if (to < 0) continue;
      float* x = row(a.x, to);
      const float* y = row(a.y, i);
      const float* base = present(a.base) ? row(a.base, i) : x;
      for (int64_t j = 0; j < d; ++j) x[j] = base[j] + y[j];
    }
  });
}

void gather_norm(const lemo_exec& exec, const lemo_gather_norm_args& a) {
  const int64_t d = a.x.shape[1];
  const int32_t* rows = ints(a.rows);
  const float* weight = floats(a.weight);
  const float* bias = floats(a.bias);
  const Scratch scratch(exec, a.y.shape[0], "x", Size(2) * d);
  parallel_ranges(exec, a.y.shape[0], kGrain, [&](int64_t first, int64_t last, int worker) {
    float* sum = scratch.of(worker);
    float* centered = sum + d;
    for (int64_t i = first; i < last; ++i) {
      const int64_t from = source(rows, i);
      if (from < 0) {
        std::fill_n(sum, d, 0.0f);
      } else {
        std::memcpy(sum, row(a.x, from), static_cast<size_t>(d) * sizeof(float));
      }
      if (present(a.residual)) simd().add(d, sum, row(a.residual, i), 1.0f);
      const Statistics stats = statistics(d, sum, a.norm, a.eps, centered);
      if (present(a.packed)) std::memcpy(row(a.packed, i), sum, static_cast<size_t>(d) * sizeof(float));
      float* y = row(a.y, i);
      for (int64_t j = 0; j < d; ++j) {
        float value = (sum[j] - stats.mean) * stats.rstd;
        if (weight != nullptr) value *= weight[j];
        if (bias != nullptr) value += bias[j];
        y[j] = value;
      }
    }
  });
}

// With xhat = (s - mean) rstd and g = dy weight:
//   RMS:   ds = rstd (g - xhat mean(g xhat));   LAYER: ds = rstd (g - mean(g) - xhat mean(g xhat))
void gather_norm_backward(const lemo_exec& exec, const lemo_gather_norm_backward_args& a) {
  const int64_t m = a.dy.shape[0];
  const int64_t d = a.dy.shape[1];
  const int32_t* rows = ints(a.rows);
  const float* weight = floats(a.weight);
  const bool parameters = present(a.dweight) || present(a.dbias);
  // Partial parameter gradients of every range of rows, added up in order afterwards.
  auto* partial = static_cast<float*>(exec.workspace);
  const Scratch scratch(exec, m, "dy", Size(2) * d);
  parallel_ranges(exec, m, kGrain, [&](int64_t first, int64_t last, int worker) {
    float* xhat = scratch.of(worker);
    float* g = xhat + d;
    float* dweight = parameters ? partial + first / kGrain * 2 * d : nullptr;
    if (parameters) std::fill_n(dweight, 2 * d, 0.0f);
    for (int64_t i = first; i < last; ++i) {
      const float* dy = row(a.dy, i);
      const float* s = row(a.s, i);
      const Statistics stats = statistics(d, s, a.norm, a.eps, g);
      for (int64_t j = 0; j < d; ++j) {
        xhat[j] = (s[j] - stats.mean) * stats.rstd;
        g[j] = weight != nullptr ? dy[j] * weight[j] : dy[j];
      }
      const int64_t to = source(rows, i);
      if (parameters && to >= 0) {
        for (int64_t j = 0; j < d; ++j) {
          dweight[j] += dy[j] * xhat[j];
          dweight[d + j] += dy[j];
        }
      }
      if (to < 0) continue;
      const float along = simd().dot(d, g, xhat) / static_cast<float>(d);
      const float mean = a.norm == LEMO_NORM_LAYER ? simd().sum(d, g) / static_cast<float>(d) : 0.0f;
      float* dx = row(a.dx, to);
      for (int64_t j = 0; j < d; ++j) g[j] = stats.rstd * (g[j] - mean - xhat[j] * along);
      if (present(a.ds_extra)) simd().add(d, g, row(a.ds_extra, i), 1.0f);
      if (a.accumulate != 0) {
        simd().add(d, dx, g, 1.0f);
      } else {
        std::memcpy(dx, g, static_cast<size_t>(d) * sizeof(float));
      }
    }
  });
  if (!parameters) return;
  const int64_t ranges = (m + kGrain - 1) / kGrain;
  for (int part = 0; part < 2; ++part) {
    const lemo_tensor& tensor = part == 0 ? a.dweight : a.dbias;
    if (!present(tensor)) continue;
    float* out = floats(tensor);
    std::fill_n(out, d, 0.0f);
    for (int64_t range = 0; range < ranges; ++range) simd().add(d, out, partial + (2 * range + part) * d, 1.0f);
  }
}

uint64_t gather_norm_backward_workspace(const lemo_exec&, const lemo_gather_norm_backward_args& a) {
  if (!present(a.dweight) && !present(a.dbias)) return 0;
  const int64_t ranges = (a.dy.shape[0] + kGrain - 1) / kGrain;
  return (Size(2) * ranges * a.dy.shape[1]).floats("dy");
}

}  // namespace lemo::ref
