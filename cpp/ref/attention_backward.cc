// Attention backward in tiles. Each task owns one query head of one document and walks its tiles in a fixed order;
// the key and value gradients of the query heads that share a key head are added up afterwards, in order.
#include <cmath>
#include <limits>

#include "ref/attention_tiles.h"
#include "ref/ops.h"
#include "src/key_rows.h"

namespace lemo::ref {
namespace {

struct Sizes {
  explicit Sizes(const lemo_attention_backward_args& a)
      : d(a.q.shape[2]),
        width(round_up(d, kLane)),
        query_heads(a.q.shape[1]),
        key_heads(a.k.shape[1]),
        capacity(present(a.rows) ? a.rows.shape[0] : a.q.shape[0]),
        tiles(max_key_tiles(key_rows(a).capacity, a.cu_seqlens.shape[0] - 1)) {}
  int64_t d;
  int64_t width;
  int64_t query_heads;
  int64_t key_heads;
  int64_t capacity;
  int64_t tiles;

  int64_t key_floats() const { return key_heads * tiles * kKeys * width; }
  int64_t query_floats() const { return query_heads * capacity * width; }
  int64_t gradient_floats() const { return query_heads * tiles * kKeys * width; }
  // All together, checked; what the functions above return is a part of it.
  Size total_floats() const {
    const Size keys = Size(key_heads) * tiles * kKeys * width, queries = Size(query_heads) * capacity * width;
    const Size gradients = Size(query_heads) * tiles * kKeys * width;
    return keys * 3 + queries * 3 + gradients * 2 + Size(query_heads) * capacity;
  }
};

struct Buffers {
  Buffers(float* workspace, const Sizes& s)
      : keys(workspace),
        keys_transposed(keys + s.key_floats()),
        values_transposed(keys_transposed + s.key_floats()),
        queries(values_transposed + s.key_floats()),
        dout(queries + s.query_floats()),
        dq(dout + s.query_floats()),
        dk(dq + s.query_floats()),
        dv(dk + s.gradient_floats()),
        delta(dv + s.gradient_floats()) {}
  float* keys;               // [Hk, tiles, kKeys, width]
  float* keys_transposed;    // [Hk, tiles, D, kKeys]
  float* values_transposed;  // [Hk, tiles, D, kKeys]
  float* queries;            // [Hq, capacity, width], scaled
  float* dout;               // [Hq, capacity, width]
  float* dq;                 // [Hq, capacity, width], without the factor `scale`
  float* dk;                 // [Hq, tiles, kKeys, width]
  float* dv;                 // [Hq, tiles, kKeys, width]
  float* delta;              // [Hq, capacity]: D_i
};

// p and ds of one pair of tiles times w_ij: the weight of the key's block unless the query lies in that block.
void apply_key_weights(const float* key_weights, const int32_t* query_slots, const int32_t* key_slots, int64_t queries,
                       int64_t keys, float* p, float* ds) {
  float weights[kKeys];
  for (int64_t j = 0; j < keys; ++j) weights[j] = key_weights[key_slots[j]];
  for (int64_t i = 0; i < queries; ++i) {
    for (int64_t j = 0; j < keys; ++j) {
      const float w = key_slots[j] == query_slots[i] ? 1.0f : weights[j];
      p[i * kKeys + j] *= w;
      ds[i * kKeys + j] *= w;
    }
  }
}

void collect(const lemo_exec& exec, const lemo_attention_backward_args& a, const Tiling& tiling, const Sizes& sizes,
             const Buffers& b) {
  const int32_t *rows = ints(a.rows), *rows_k = ints(key_rows(a).rows);
  const int64_t tile_size = kKeys * sizes.width;
  const auto num_tiles = static_cast<int64_t>(tiling.keys.size());
  parallel_for(exec, sizes.key_heads * num_tiles, [&](int64_t task) {
    const int64_t head = task / num_tiles;
    const Tile& tile = tiling.keys[static_cast<size_t>(task % num_tiles)];
    const Document& document = tiling.documents[static_cast<size_t>(tile.document)];
    const int64_t at = (head * sizes.tiles + task % num_tiles) * tile_size;
    collect_tile(a.k, rows_k, head, document.keys, tile.index, sizes.width, b.keys + at);
    collect_transposed(a.k, rows_k, head, document.keys, tile.index, b.keys_transposed + at);
    collect_transposed(a.v, rows_k, head, document.keys, tile.index, b.values_transposed + at);
  });
  const auto num_query_tiles = static_cast<int64_t>(tiling.queries.size());
  parallel_for(exec, sizes.query_heads * num_query_tiles, [&](int64_t task) {
    const int64_t head = task / num_query_tiles;
    const Tile& tile = tiling.queries[static_cast<size_t>(task % num_query_tiles)];
    const Document& document = tiling.documents[static_cast<size_t>(tile.document)];
    const int64_t first = document.queries.start + tile.index * kQueries;
    const int64_t count = std::min(kQueries, document.queries.length - tile.index * kQueries);
    const int64_t at = (head * sizes.capacity + first) * sizes.width;
    collect_rows(a.q, rows, head, first, count, a.scale, sizes.width, b.queries + at);
    collect_rows(a.dout, rows, head, first, count, 1.0f, sizes.width, b.dout + at);
    std::fill_n(b.dq + at, count * sizes.width, 0.0f);
    for (int64_t i = first; i < first + count; ++i) {
      const int64_t from = rows == nullptr ? i : rows[i];
      b.delta[head * sizes.capacity + i] = simd().dot(sizes.d, row(a.dout, from, head), row(a.out, from, head));
    }
  });
}

// All tiles of one query head of one document.
void backward_head(const lemo_attention_backward_args& a, const Sizes& sizes, const Buffers& b,
                   const FirstKeys& first_keys, const Document& document, int64_t document_index, int64_t head) {
  const Simd& f = simd();
  const int64_t width = sizes.width;
  const int64_t tile_size = kKeys * width;
  const int64_t key_base =
      (head / (sizes.query_heads / sizes.key_heads) * sizes.tiles + document.first_tile) * tile_size;
  const int64_t gradient_base = (head * sizes.tiles + document.first_tile) * tile_size;
  std::vector<float> scratch(static_cast<size_t>((2 * kQueries + 1) * kKeys));
  float* p = scratch.data();
  float* ds = p + kQueries * kKeys;
  float* slope = ds + kQueries * kKeys;
  const int64_t offset = document.offset();
  for (int64_t j = 0; j * kKeys < document.keys.length; ++j) {
    const int64_t keys = std::min(kKeys, document.keys.length - j * kKeys);
    const float* k = b.keys + key_base + j * tile_size;
    const float* k_transposed = b.keys_transposed + key_base + j * tile_size;
    const float* v_transposed = b.values_transposed + key_base + j * tile_size;
    float* dk = b.dk + gradient_base + j * tile_size;
    float* dv = b.dv + gradient_base + j * tile_size;
    std::fill_n(dk, tile_size, 0.0f);
    std::fill_n(dv, tile_size, 0.0f);
    const TileList list(a.tile_offsets, a.tiles, document, document_index, j * kKeys / LEMO_TILE_ROWS);
    const int64_t first_tile = std::max<int64_t>(j * kKeys - offset, 0) / kQueries;
    for (int64_t tile = first_tile; tile * kQueries < document.queries.length; ++tile) {
      const int64_t first = tile * kQueries;
      const int64_t count = std::min(kQueries, document.queries.length - first);
      const int64_t at = head * sizes.capacity + document.queries.start + first;
      if (first_keys.of(document.queries.start + first) >= j * kKeys + keys) break;  // outside all further windows
      poll();
      const float* q = b.queries + at * width;
      const float* dout = b.dout + at * width;
      f.matmul(count, kKeys, sizes.d, q, width, 1, k_transposed, kKeys, p, kKeys, false);
      f.matmul(count, kKeys, sizes.d, dout, width, 1, v_transposed, kKeys, ds, kKeys, false);
      const float* lse = floats(a.lse) + head * a.lse.stride[0] + document.queries.start + first;
      for (int64_t i = 0; i < count; ++i) {
        const bool seen = list.sees((first + i) / LEMO_TILE_ROWS);
        const int64_t end = seen ? std::clamp<int64_t>(first + i + offset - j * kKeys + 1, 0, keys) : 0;
        const int64_t begin =
            std::clamp<int64_t>(first_keys.of(document.queries.start + first + i) - j * kKeys, 0, end);
        const int64_t n = end - begin;
        float* p_row = p + i * kKeys;
        float* ds_row = ds + i * kKeys;
        std::fill_n(p_row, begin, 0.0f);
        std::fill_n(ds_row, begin, 0.0f);
        std::fill(p_row + end, p_row + kKeys, 0.0f);
        std::fill(ds_row + end, ds_row + kKeys, 0.0f);
        p_row += begin;
        ds_row += begin;
        if (a.softcap > 0) f.softcap(n, p_row, a.softcap, slope);
        f.exp(n, p_row, 1.0f, lse[i]);
        f.softmax_backward(n, p_row, ds_row, b.delta[at + i], ds_row);
        if (a.softcap > 0) {
          for (int64_t c = 0; c < n; ++c) ds_row[c] *= slope[c];
        }
      }
      if (present(a.key_weights)) {
        const lemo_tensor& key_slots = key_rows(a).separate ? a.row_slots_k : a.row_slots;
        apply_key_weights(floats(a.key_weights), ints(a.row_slots) + document.queries.start + first,
                          ints(key_slots) + document.keys.start + j * kKeys, count, keys, p, ds);
      }
      f.matmul(kKeys, width, count, p, 1, kKeys, dout, width, dv, width, true);
      f.matmul(kKeys, width, count, ds, 1, kKeys, q, width, dk, width, true);
      f.matmul(count, width, keys, ds, kKeys, 1, k, width, b.dq + at * width, width, true);
    }
  }
}

// A sink has the value 0, so that of its dS only -P D_i is left.
void sink_gradients(const lemo_exec& exec, const lemo_attention_backward_args& a, const Tiling& tiling,
                    const Sizes& sizes, const Buffers& b) {
  const int64_t rows = tiling.documents.back().queries.start + tiling.documents.back().queries.length;
  parallel_for(exec, sizes.query_heads, [&](int64_t head) {
    const float sink = floats(a.sinks)[head];
    const float* lse = floats(a.lse) + head * a.lse.stride[0];
    const float* delta = b.delta + head * sizes.capacity;
    double sum = 0;
    if (sink != -std::numeric_limits<float>::infinity()) {
      for (int64_t i = 0; i < rows; ++i) sum -= std::exp(static_cast<double>(sink) - lse[i]) * delta[i];
    }
    floats(a.dsinks)[head] = static_cast<float>(sum);
  });
}

}  // namespace

void attention_backward(const lemo_exec& exec, const lemo_attention_backward_args& a) {
  const Sizes sizes(a);
  const KeyRows key_side = key_rows(a);
  const Tiling tiling(a.cu_seqlens, key_side.cu_seqlens);
  const Buffers b(static_cast<float*>(exec.workspace), sizes);
  const FirstKeys first_keys(a, tiling.documents);
  collect(exec, a, tiling, sizes, b);
  const auto num_documents = static_cast<int64_t>(tiling.documents.size());
  parallel_for(exec, num_documents * sizes.query_heads, [&](int64_t task) {
    const int64_t document = task / sizes.query_heads;
    backward_head(a, sizes, b, first_keys, tiling.documents[static_cast<size_t>(document)], document,
                  task % sizes.query_heads);
  });

  // Outputs are written from here on: no memory is needed any more.
  if (present(a.dsinks)) sink_gradients(exec, a, tiling, sizes, b);
  const int32_t *rows = ints(a.rows), *rows_k = ints(key_side.rows);
  const int64_t group = sizes.query_heads / sizes.key_heads;
  for (const Document& document : tiling.documents) {
    parallel_ranges(exec, document.queries.length, kKeys, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t packed = document.queries.start + i;
        for (int64_t head = 0; head < sizes.query_heads; ++head) {
          const float* from = b.dq + (head * sizes.capacity + packed) * sizes.width;
          float* dq = row(a.dq, rows == nullptr ? packed : rows[packed], head);
          for (int64_t c = 0; c < sizes.d; ++c) dq[c] = a.scale * from[c];
        }
      }
    });
    parallel_ranges(exec, document.keys.length, kKeys, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t packed = document.keys.start + i;
        const int64_t to = rows_k == nullptr ? packed : rows_k[packed];
        for (int64_t head = 0; head < sizes.key_heads; ++head) {
          float* dk = row(a.dk, to, head);
          float* dv = row(a.dv, to, head);
          std::fill_n(dk, sizes.d, 0.0f);
          std::fill_n(dv, sizes.d, 0.0f);
          for (int64_t member = head * group; member < (head + 1) * group; ++member) {
            const int64_t from = ((member * sizes.tiles + document.first_tile) * kKeys + i) * sizes.width;
            simd().add(sizes.d, dk, b.dk + from, 1.0f);  // the factor `scale` is in the queries
            simd().add(sizes.d, dv, b.dv + from, 1.0f);
          }
        }
      }
    });
  }
}

uint64_t attention_backward_workspace(const lemo_exec&, const lemo_attention_backward_args& a) {
  return Sizes(a).total_floats().floats("q, k, v");
}

}  // namespace lemo::ref
