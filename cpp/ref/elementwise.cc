#include <algorithm>
#include <cmath>

#include "ref/ops.h"
#include "ref/parallel.h"
#include "ref/simd.h"
#include "ref/view.h"

namespace lemo::ref {
namespace {

constexpr int64_t kGrain = 16;   // rows per task
constexpr int64_t kChunk = 256;  // elements whose exponentials are computed at once

uint8_t* bytes(const lemo_tensor& t, int64_t i) { return static_cast<uint8_t*>(t.data) + i * t.stride[0]; }

// s[j] = 1 / (1 + exp(-z[j])) for up to kChunk elements, by exponentials of numbers below 0 alone: these cannot
// overflow, however large z is.
void sigmoid(int64_t n, const float* z, float* s) {
  for (int64_t j = 0; j < n; ++j) s[j] = -std::abs(z[j]);
  simd().exp(n, s, 1.0f, 0.0f);
  for (int64_t j = 0; j < n; ++j) s[j] = (z[j] < 0 ? s[j] : 1.0f) / (1.0f + s[j]);
}

}  // namespace

void rotary(const lemo_exec& exec, const lemo_rotary_args& a) {
  const int64_t heads = a.x.shape[1], d = a.x.shape[2], half = d / 2;
  const int32_t* rows = ints(a.rows);
  const float sign = a.inverse != 0 ? -1.0f : 1.0f;
  parallel_ranges(exec, a.x.shape[0], kGrain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t from = rows == nullptr ? i : rows[i];
      if (from < 0) {
        for (int64_t h = 0; h < heads; ++h) std::fill_n(row(a.out, i, h), d, 0.0f);
        continue;
      }
      const float *cos = row(a.cos, from), *sin = row(a.sin, from);
      for (int64_t h = 0; h < heads; ++h) {
        const float* x = row(a.x, i, h);
        float* out = row(a.out, i, h);
        for (int64_t j = 0; j < half; ++j) {
          const float u = x[j], v = x[j + half];  // read before `out`, which may be `x`, is written
          out[j] = u * cos[j] - sign * sin[j] * v;
          out[j + half] = v * cos[j] + sign * sin[j] * u;
        }
      }
    }
  });
}

void swiglu(const lemo_exec& exec, const lemo_swiglu_args& a) {
  const int64_t f = a.gate.shape[1];
  parallel_ranges(exec, a.gate.shape[0], kGrain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      float s[kChunk];
      for (int64_t start = 0; start < f; start += kChunk) {
        const float *gate = row(a.gate, i) + start, *up = row(a.up, i) + start;
        float* out = row(a.out, i) + start;
        const int64_t n = std::min(kChunk, f - start);
        sigmoid(n, gate, s);
        for (int64_t j = 0; j < n; ++j) out[j] = gate[j] * s[j] * up[j];
      }
    }
  });
}

void swiglu_backward(const lemo_exec& exec, const lemo_swiglu_backward_args& a) {
  const int64_t f = a.dout.shape[1];
  parallel_ranges(exec, a.dout.shape[0], kGrain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      float s[kChunk];
      for (int64_t start = 0; start < f; start += kChunk) {
        const float *dout = row(a.dout, i) + start, *gate = row(a.gate, i) + start, *up = row(a.up, i) + start;
        float *dgate = row(a.dgate, i) + start, *dup = row(a.dup, i) + start;
        const int64_t n = std::min(kChunk, f - start);
        sigmoid(n, gate, s);
        for (int64_t j = 0; j < n; ++j) {
          const float d = dout[j], z = gate[j], u = up[j];  // read before the outputs, which may be inputs, are written
          dgate[j] = d * u * (s[j] * (1.0f + z * (1.0f - s[j])));
          dup[j] = d * (z * s[j]);
        }
      }
    }
  });
}

void relu(const lemo_exec& exec, const lemo_relu_args& a) {
  const int64_t f = a.x.shape[1];
  parallel_ranges(exec, a.x.shape[0], kGrain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const float* x = row(a.x, i);
      float* out = row(a.out, i);
      uint8_t* bits = bytes(a.bits, i);
      for (int64_t start = 0; start < f; start += 8) {
        unsigned byte = 0;
        for (int64_t j = start; j < std::min(start + 8, f); ++j) {
          const float z = x[j];  // read before `out`, which may be `x`, is written
          const bool passes = !(z <= 0.0f);
          out[j] = passes ? z : 0.0f;
          byte |= static_cast<unsigned>(passes) << (j - start);
        }
        bits[start / 8] = static_cast<uint8_t>(byte);
      }
    }
  });
}

void relu_backward(const lemo_exec& exec, const lemo_relu_backward_args& a) {
  const int64_t f = a.dout.shape[1];
  parallel_ranges(exec, a.dout.shape[0], kGrain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const float* dout = row(a.dout, i);
      const uint8_t* bits = bytes(a.bits, i);
      float* dx = row(a.dx, i);
      for (int64_t j = 0; j < f; ++j) dx[j] = (bits[j / 8] >> (j % 8) & 1) != 0 ? dout[j] : 0.0f;
    }
  });
}

}  // namespace lemo::ref
