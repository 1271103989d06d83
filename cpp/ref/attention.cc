// Attention on the CPU: tiles of 64 x 64 scores with an online softmax, so memory stays linear in the tokens.
//
// Forward runs one task per (query tile, key head); the query heads of a group share the packed key and value tile.
// Backward runs one task per (document, key head), which owns the gradients of that head and of its query heads: no
// sums across tasks, so results do not depend on the number of threads.
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

constexpr float kMasked = -1e30f;

// One [R, heads, D] tensor addressed by packed row.
struct Heads {
  Heads(const lemo_tensor& t, const lemo_tensor& map) : tensor(t), rows(ints(map)) {}
  float* at(int64_t i, int64_t head) const { return row(tensor, rows ? rows[i] : i, head); }
  const lemo_tensor& tensor;
  const int32_t* rows;
};

struct Shape {
  template <class Args>
  explicit Shape(const Args& a)
      : key_heads(a.k.shape[1]),
        group(a.q.shape[1] / a.k.shape[1]),
        dim(a.q.shape[2]),
        padded(round_up(a.q.shape[2], kLane)),
        documents(a.cu_seqlens.shape[0] - 1),
        cu_seqlens(ints(a.cu_seqlens)) {}
  int64_t key_heads, group, dim, padded, documents;
  const int32_t* cu_seqlens;
};

struct QueryTile {
  int64_t document, first, rows;  // first packed row of the document and of the tile
};

class Forward {
 public:
  explicit Forward(const lemo_attention_forward_args& a)
      : shape(a),
        q_(a.q, a.rows),
        k_(a.k, a.rows),
        v_(a.v, a.rows),
        out_(a.out, a.rows),
        lse_(a.lse),
        scale_(a.scale) {}

  void run(const QueryTile& tile, int64_t key_head) const {
    const Simd& f = simd();
    const int64_t padded = shape.padded, group = shape.group, size = kTile * padded;
    std::vector<float> memory(static_cast<size_t>(size * (2 + 2 * group) + kTile * kTile + 2 * group * kTile));
    float* kt = memory.data();
    float* values = kt + size;
    float* queries = values + size;
    float* sums = queries + size * group;
    float* scores = sums + size * group;
    float* row_max = scores + kTile * kTile;
    float* row_sum = row_max + group * kTile;
    std::fill(row_max, row_sum, kMasked);
    for (int64_t g = 0; g < group; ++g) {
      pack_rows(queries + size * g, padded, tile.rows, shape.dim,
                [&](int64_t i) { return q_.at(tile.first + i, key_head * group + g); });
    }
    const int64_t end = tile.first + tile.rows;
    for (int64_t key = tile.document; key < end; key += kTile) {
      const int64_t keys = std::min(kTile, end - key);
      pack_transposed(kt, keys, shape.dim, [&](int64_t j) { return k_.at(key + j, key_head); });
      pack_rows(values, padded, keys, shape.dim, [&](int64_t j) { return v_.at(key + j, key_head); });
      for (int64_t g = 0; g < group; ++g) {
        float* sum = sums + size * g;
        f.matmul(tile.rows, kTile, shape.dim, queries + size * g, padded, 1, kt, kTile, scores, kTile, false);
        for (int64_t i = 0; i < tile.rows; ++i) {
          float* s = scores + i * kTile;
          float& top = row_max[g * kTile + i];
          const int64_t visible = std::min(keys, tile.first + i - key + 1);
          const float new_top = larger(top, scale_ < 0 ? lowest_scaled(s, visible) : scale_ * f.max(visible, s));
          const float factor = std::exp(top - new_top);
          row_sum[g * kTile + i] = row_sum[g * kTile + i] * factor + f.exp_sum(visible, s, scale_, new_top);
          std::fill(s + visible, s + kTile, 0.0f);
          if (factor != 1.0f) f.multiply(padded, sum + i * padded, factor);
          top = new_top;
        }
        f.matmul(tile.rows, padded, keys, scores, kTile, 1, values, padded, sum, padded, true);
      }
    }
    for (int64_t g = 0; g < group; ++g) {
      const int64_t head = key_head * group + g;
      for (int64_t i = 0; i < tile.rows; ++i) {
        const float total = row_sum[g * kTile + i];
        const float* sum = sums + size * g + i * padded;
        float* out = out_.at(tile.first + i, head);
        for (int64_t c = 0; c < shape.dim; ++c) out[c] = sum[c] / total;
        row(lse_, head)[tile.first + i] = row_max[g * kTile + i] + std::log(total);
      }
    }
  }

  Shape shape;

 private:
  // A NaN wins: it must reach the output.
  static float larger(float a, float b) { return a >= b ? a : b; }
  float lowest_scaled(const float* s, int64_t n) const {
    float top = kMasked;
    for (int64_t j = 0; j < n; ++j) top = larger(top, scale_ * s[j]);
    return top;
  }

  Heads q_, k_, v_, out_;
  const lemo_tensor& lse_;
  float scale_;
};

class Backward {
 public:
  explicit Backward(const lemo_attention_backward_args& a)
      : shape(a),
        dout_(a.dout, a.rows),
        q_(a.q, a.rows),
        k_(a.k, a.rows),
        v_(a.v, a.rows),
        out_(a.out, a.rows),
        dq_(a.dq, a.rows),
        dk_(a.dk, a.rows),
        dv_(a.dv, a.rows),
        lse_(a.lse),
        key_weights_(floats(a.key_weights)),
        row_slots_(ints(a.row_slots)),
        scale_(a.scale) {}

  void run(int64_t document, int64_t key_head) const {
    const int64_t start = shape.cu_seqlens[document], n = shape.cu_seqlens[document + 1] - start;
    if (n == 0) return;
    const int64_t padded = shape.padded;
    const size_t whole = static_cast<size_t>(n * padded);
    Scratch s(n, padded);
    std::vector<float> dk(whole), dv(whole), dq(whole);
    for (int64_t g = 0; g < shape.group; ++g) {
      const int64_t head = key_head * shape.group + g;
      pack_rows(s.queries.data(), padded, n, shape.dim, [&](int64_t i) { return q_.at(start + i, head); });
      pack_rows(s.douts.data(), padded, n, shape.dim, [&](int64_t i) { return dout_.at(start + i, head); });
      for (int64_t i = 0; i < n; ++i) {
        s.delta[i] = simd().dot(shape.dim, out_.at(start + i, head), s.douts.data() + i * padded);
      }
      std::fill(dq.begin(), dq.end(), 0.0f);
      for (int64_t key = 0; key < n; key += kTile) {
        key_tile(s, start, n, key, head, key_head, dq.data(), dk.data(), dv.data());
      }
      for (int64_t i = 0; i < n; ++i) write(dq_.at(start + i, head), dq.data() + i * padded, scale_);
    }
    for (int64_t i = 0; i < n; ++i) {
      write(dk_.at(start + i, key_head), dk.data() + i * padded, scale_);
      write(dv_.at(start + i, key_head), dv.data() + i * padded, 1.0f);
    }
  }

  Shape shape;

 private:
  struct Scratch {
    Scratch(int64_t n, int64_t padded)
        : queries(n * padded),
          douts(n * padded),
          delta(n),
          keys(kTile * padded),
          kt(kTile * padded),
          vt(kTile * padded),
          p(kTile * kTile),
          ds(kTile * kTile) {}
    std::vector<float> queries, douts, delta, keys, kt, vt, p, ds;
    float weights[kTile];
    int32_t slots[kTile];
  };

  // One tile of keys against every query that sees it.
  void key_tile(Scratch& s, int64_t start, int64_t n, int64_t key, int64_t head, int64_t key_head, float* dq, float* dk,
                float* dv) const {
    const Simd& f = simd();
    const int64_t padded = shape.padded, keys = std::min(kTile, n - key);
    const auto key_row = [&](int64_t j) { return k_.at(start + key + j, key_head); };
    pack_rows(s.keys.data(), padded, keys, shape.dim, key_row);
    pack_transposed(s.kt.data(), keys, shape.dim, key_row);
    pack_transposed(s.vt.data(), keys, shape.dim, [&](int64_t j) { return v_.at(start + key + j, key_head); });
    if (key_weights_) {
      for (int64_t j = 0; j < keys; ++j) {
        s.slots[j] = row_slots_[start + key + j];
        s.weights[j] = key_weights_[s.slots[j]];
      }
    }
    for (int64_t query = key; query < n; query += kTile) {
      const int64_t rows = std::min(kTile, n - query);
      const float* q = s.queries.data() + query * padded;
      const float* dout = s.douts.data() + query * padded;
      f.matmul(rows, kTile, shape.dim, q, padded, 1, s.kt.data(), kTile, s.p.data(), kTile, false);
      f.matmul(rows, kTile, shape.dim, dout, padded, 1, s.vt.data(), kTile, s.ds.data(), kTile, false);
      for (int64_t i = 0; i < rows; ++i) {
        float *p = s.p.data() + i * kTile, *ds = s.ds.data() + i * kTile;
        const int64_t visible = std::min(keys, query + i - key + 1);
        f.exp(visible, p, scale_, row(lse_, head)[start + query + i]);
        f.softmax_backward(visible, p, ds, s.delta[query + i], ds);
        std::fill(p + visible, p + kTile, 0.0f);
        std::fill(ds + visible, ds + kTile, 0.0f);
        if (key_weights_) weigh(s, p, ds, row_slots_[start + query + i], visible);
      }
      f.matmul(keys, padded, rows, s.p.data(), 1, kTile, dout, padded, dv + key * padded, padded, true);
      f.matmul(keys, padded, rows, s.ds.data(), 1, kTile, q, padded, dk + key * padded, padded, true);
      f.matmul(rows, padded, keys, s.ds.data(), kTile, 1, s.keys.data(), padded, dq + query * padded, padded, true);
    }
  }

  // Multiplies a row of probabilities and score gradients by w_ij: key j's weight, 1 in the query's own slot.
  static void weigh(const Scratch& s, float* p, float* ds, int32_t own, int64_t visible) {
    for (int64_t j = 0; j < visible; ++j) {
      const float w = s.slots[j] == own ? 1.0f : s.weights[j];
      p[j] *= w;
      ds[j] *= w;
    }
  }

  void write(float* to, const float* from, float factor) const {
    for (int64_t c = 0; c < shape.dim; ++c) to[c] = factor * from[c];
  }

  Heads dout_, q_, k_, v_, out_, dq_, dk_, dv_;
  const lemo_tensor& lse_;
  const float* key_weights_;  // by slot, or null
  const int32_t* row_slots_;
  float scale_;
};

}  // namespace

void attention_forward(const lemo_exec& exec, const lemo_attention_forward_args& a) {
  const Forward forward(a);
  const Shape& shape = forward.shape;
  std::vector<QueryTile> tiles;
  for (int64_t d = 0; d < shape.documents; ++d) {
    const int64_t start = shape.cu_seqlens[d], end = shape.cu_seqlens[d + 1];
    for (int64_t first = start; first < end; first += kTile)
      tiles.push_back({start, first, std::min(kTile, end - first)});
  }
  // The longest tasks first: the last to finish is then a short one.
  std::stable_sort(tiles.begin(), tiles.end(),
                   [](const QueryTile& x, const QueryTile& y) { return x.first - x.document > y.first - y.document; });
  parallel_for(exec, static_cast<int64_t>(tiles.size()) * shape.key_heads, [&](int64_t task) {
    forward.run(tiles[static_cast<size_t>(task / shape.key_heads)], task % shape.key_heads);
  });
}

void attention_backward(const lemo_exec& exec, const lemo_attention_backward_args& a) {
  const Backward backward(a);
  const int64_t key_heads = backward.shape.key_heads;
  parallel_for(exec, backward.shape.documents * key_heads,
               [&](int64_t task) { backward.run(task / key_heads, task % key_heads); });
}

uint64_t attention_forward_workspace(const lemo_exec&, const lemo_attention_forward_args&) { return 0; }
uint64_t attention_backward_workspace(const lemo_exec&, const lemo_attention_backward_args&) { return 0; }

}  // namespace lemo::ref
