// Attention forward in tiles with a running maximum and sum of every row, so that no row of P exists as a whole.
#include <cmath>
#include <limits>
#include <utility>

#include "ref/attention_tiles.h"
#include "ref/ops.h"
#include "src/key_rows.h"

namespace lemo::ref {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What a worker needs for one tile of queries. A sink is a key that every row has seen at the start, its value 0.
struct QueryTile {
  QueryTile(float* memory, int64_t width, float sink)
      : queries(memory),
        sums(queries + kQueries * width),
        tile(sums + kQueries * width),
        highest(tile + kQueries * kKeys),
        total(highest + kQueries) {
    std::fill_n(sums, kQueries * width, 0.0f);
    std::fill_n(highest, kQueries, sink);
    std::fill_n(total, kQueries, sink == -kInfinity ? 0.0f : 1.0f);
  }
  static Size floats(int64_t width) { return (Size(2) * width + kKeys + 2) * kQueries; }
  float* queries;  // [kQueries, width], scaled
  float* sums;     // [kQueries, width]: unnormalized output
  float* tile;     // [kQueries, kKeys]: scores, then probabilities
  float* highest;  // running maximum
  float* total;    // running sum of exponentials
};

// Turns the scores of `count` rows into probabilities against the running maximum. Row i sees the keys
// [keys(i).first, keys(i).second) of the tile.
template <class KeysOf>
void online_softmax(QueryTile& s, int64_t count, int64_t width, float softcap, const KeysOf& keys) {
  const Simd& f = simd();
  for (int64_t i = 0; i < count; ++i) {
    float* scores = s.tile + i * kKeys;
    const auto [begin, end] = keys(i);
    if (begin >= end) {
      std::fill(scores, scores + kKeys, 0.0f);
      continue;
    }
    std::fill(scores, scores + begin, 0.0f);
    std::fill(scores + end, scores + kKeys, 0.0f);
    scores += begin;
    const int64_t n = end - begin;
    if (softcap > 0) f.softcap(n, scores, softcap, nullptr);
    const float found = f.max(n, scores);
    const float highest = found > s.highest[i] || std::isnan(found) ? found : s.highest[i];
    const float keep = std::exp(s.highest[i] - highest);
    s.total[i] = s.total[i] * keep + f.exp_sum(n, scores, 1.0f, highest);
    if (keep != 1.0f) f.multiply(width, s.sums + i * width, keep);
    s.highest[i] = highest;
  }
}

}  // namespace

void attention_forward(const lemo_exec& exec, const lemo_attention_forward_args& a) {
  const int64_t d = a.q.shape[2];
  const int64_t width = round_up(d, kLane);
  const int64_t key_heads = a.k.shape[1];
  const int64_t group = a.q.shape[1] / key_heads;
  const int32_t* rows = ints(a.rows);
  const KeyRows key_side = key_rows(a);
  const Tiling tiling(a.cu_seqlens, key_side.cu_seqlens);
  const FirstKeys first_keys(a, tiling.documents);
  const auto num_tiles = static_cast<int64_t>(tiling.keys.size());
  const auto num_query_tiles = static_cast<int64_t>(tiling.queries.size());

  const int64_t tile_size = kKeys * width;
  auto* keys = static_cast<float*>(exec.workspace);          // [Hk, tiles, D, kKeys] in steps of tile_size
  float* values = keys + key_heads * num_tiles * tile_size;  // [Hk, tiles, kKeys, width]
  const int64_t query_tasks = a.q.shape[1] * num_query_tiles;
  const Scratch scratch(exec, query_tasks, "q", QueryTile::floats(width));
  parallel_for(exec, key_heads * num_tiles, [&](int64_t task) {
    const int64_t head = task / num_tiles;
    const Tile& tile = tiling.keys[static_cast<size_t>(task % num_tiles)];
    const Document& document = tiling.documents[static_cast<size_t>(tile.document)];
    collect_transposed(a.k, ints(key_side.rows), head, document.keys, tile.index, keys + task * tile_size);
    collect_tile(a.v, ints(key_side.rows), head, document.keys, tile.index, width, values + task * tile_size);
  });

  parallel_for(exec, query_tasks, [&](int64_t task, int worker) {
    const Simd& f = simd();
    const int64_t head = task / num_query_tiles;
    // The longest rows first, so that no thread is left with one at the end.
    const Tile& tile = tiling.queries[static_cast<size_t>(num_query_tiles - 1 - task % num_query_tiles)];
    const Document& document = tiling.documents[static_cast<size_t>(tile.document)];
    const int64_t first = tile.index * kQueries;
    const int64_t count = std::min(kQueries, document.queries.length - first);
    const int64_t seen = first + document.offset();  // the last key that the first row sees
    const int64_t base = (head / group * num_tiles + document.first_tile) * tile_size;
    QueryTile s(scratch.of(worker), width, present(a.sinks) ? floats(a.sinks)[head] : -kInfinity);
    collect_rows(a.q, rows, head, document.queries.start + first, count, a.scale, width, s.queries);
    // These rows lie in at most two tiles of the tile lists.
    const int64_t list_tile = first / LEMO_TILE_ROWS;
    const int64_t upper = std::min(count, (list_tile + 1) * LEMO_TILE_ROWS - first);
    const TileList upper_list(a.tile_offsets, a.tiles, document, tile.document, list_tile);
    const TileList lower_list(a.tile_offsets, a.tiles, document, tile.document, list_tile + (upper < count ? 1 : 0));
    for (int64_t j = first_keys.of(document.queries.start + first) / kKeys; j * kKeys < seen + count; ++j) {
      const int64_t key_tile = j * kKeys / LEMO_TILE_ROWS;
      const bool upper_sees = upper_list.sees(key_tile), lower_sees = upper < count && lower_list.sees(key_tile);
      if (!upper_sees && !lower_sees) continue;
      poll();
      f.matmul(count, kKeys, d, s.queries, width, 1, keys + base + j * tile_size, kKeys, s.tile, kKeys, false);
      online_softmax(s, count, width, a.softcap, [&](int64_t i) {
        const int64_t begin = first_keys.of(document.queries.start + first + i) - j * kKeys;
        const int64_t end = (i < upper ? upper_sees : lower_sees) ? seen + i - j * kKeys + 1 : 0;
        return std::pair(std::max<int64_t>(begin, 0), std::min(end, kKeys));
      });
      f.matmul(count, width, std::min(kKeys, seen + count - j * kKeys), s.tile, kKeys, 1, values + base + j * tile_size,
               width, s.sums, width, true);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t packed = document.queries.start + first + i;
      float* out = row(a.out, rows == nullptr ? packed : rows[packed], head);
      const float total = s.total[i] == 0 ? 1.0f : s.total[i];  // a row that sees nothing: 0 / 1, -infinity + log 1
      for (int64_t c = 0; c < d; ++c) out[c] = s.sums[i * width + c] / total;
      floats(a.lse)[head * a.lse.stride[0] + packed] = s.highest[i] + std::log(total);
    }
  });
}

uint64_t attention_forward_workspace(const lemo_exec&, const lemo_attention_forward_args& a) {
  const int64_t tiles = max_key_tiles(key_rows(a).capacity, a.cu_seqlens.shape[0] - 1);
  return (Size(2 * kKeys) * a.k.shape[1] * tiles * round_up(a.q.shape[2], kLane)).floats("q, k, v");
}

}  // namespace lemo::ref
