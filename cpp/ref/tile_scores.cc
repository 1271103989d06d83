// Attention mass of key tiles. A task owns one query tile, so every sum has a fixed order. The query heads that share a
// key head go through the keys together, and a tile of keys leaves a maximum and a sum per row: the log-sum-exp of a
// row is known only after its last key.
#include <cmath>
#include <vector>

#include "ref/attention_tiles.h"
#include "ref/ops.h"
#include "src/tile_slots.h"

namespace lemo::ref {
namespace {

constexpr int64_t kTile = LEMO_TILE_ROWS;

struct Sizes {
  explicit Sizes(const lemo_tile_scores_args& a)
      : d(a.q.shape[2]),
        key_heads(a.k.shape[1]),
        group(a.q.shape[1] / a.k.shape[1]),
        tiles(a.max_seqlen / kTile + (a.max_seqlen % kTile != 0 ? 1 : 0)) {}
  int64_t d;
  int64_t key_heads;
  int64_t group;
  int64_t tiles;  // of the longest document

  // Of the workspace: all keys.
  Size key_floats(const lemo_tile_scores_args& a) const {
    const int64_t capacity = present(a.rows) ? a.rows.shape[0] : a.q.shape[0];
    return Size(kTile) * (capacity / kTile + a.cu_seqlens.shape[0] - 1) * key_heads * d;
  }
};

// What a worker needs for the rows of one key head: `probes` rows of each query head of its group.
struct Probes {
  Probes(float* memory, const Sizes& s, int64_t rows)
      : queries(memory),
        products(queries + rows * s.d),
        highest(products + rows * kTile),
        sums(highest + rows * s.tiles) {}
  static Size floats(const Sizes& s, int64_t rows) { return (Size(s.d) + kTile + Size(2) * s.tiles) * rows; }
  float* queries;   // [rows, D], scaled
  float* products;  // [rows, kTile]
  float* highest;   // [rows, tiles]: the highest score of a row in a key tile
  float* sums;      // [rows, tiles]: sum of exp(score - highest)
};

// The rows of a query tile that are looked at, each once with the number of probes that it is.
struct ProbeRows {
  ProbeRows(int64_t size, int64_t probes) {
    for (int64_t r = 0; r < probes; ++r) {
      const int64_t row = (2 * r + 1) * size / (2 * probes);
      if (size_ == 0 || rows_[size_ - 1] != row) rows_[size_++] = row;
      ++counts_[size_ - 1];
    }
  }
  int64_t size() const { return size_; }
  int64_t row(int64_t i) const { return rows_[i]; }  // within the tile
  int64_t count(int64_t i) const { return counts_[i]; }

 private:
  int64_t size_ = 0;
  int64_t rows_[kTile];
  int64_t counts_[kTile] = {};
};

// What a worker adds up for one query tile, each [tiles].
struct Totals {
  Totals(double* memory, int64_t tiles) : head(memory), all(head + tiles), peaks(all + tiles) {}
  static constexpr int64_t kArrays = 3;
  double* head;   // over the probes of one head
  double* all;    // over all heads
  double* peaks;  // the maximum over heads
};

// totals[n] += count * sum over keys of tile n of the row's probabilities.
void add_masses(const float* highest, const float* sums, int64_t tiles, int64_t count, double* totals) {
  const float top = simd().max(tiles, highest);
  double all = 0;
  for (int64_t n = 0; n < tiles; ++n) all += sums[n] * std::exp(static_cast<double>(highest[n]) - top);
  const double factor = static_cast<double>(count) / all;
  for (int64_t n = 0; n < tiles; ++n) totals[n] += factor * sums[n] * std::exp(static_cast<double>(highest[n]) - top);
}

// Adds the heads of one key head to the totals of one query tile; `keys`: its tiles, [D, kTile] each.
void add_group(const lemo_tile_scores_args& a, const Sizes& s, const TileSlot& tile, const ProbeRows& probes,
               int64_t key_head, const float* keys, const Probes& memory, const Totals& totals) {
  const Simd& f = simd();
  const int64_t count = probes.size();
  const int64_t first = tile.start + tile.index * kTile;
  for (int64_t g = 0; g < s.group; ++g) {
    for (int64_t p = 0; p < count; ++p) {
      collect_rows(a.q, ints(a.rows), key_head * s.group + g, first + probes.row(p), 1, a.scale, s.d,
                   memory.queries + (g * count + p) * s.d);
    }
  }
  const int64_t rows = s.group * count;
  for (int64_t n = 0; n <= tile.index; ++n) {
    poll();
    f.matmul(rows, kTile, s.d, memory.queries, s.d, 1, keys + n * s.d * kTile, kTile, memory.products, kTile, false);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t seen = n < tile.index ? kTile : probes.row(i % count) + 1;
      float* products = memory.products + i * kTile;
      const float highest = f.max(seen, products);
      memory.highest[i * s.tiles + n] = highest;
      memory.sums[i * s.tiles + n] = f.exp_sum(seen, products, 1.0f, highest);
    }
  }
  const int64_t tiles = tile.index + 1;
  for (int64_t g = 0; g < s.group; ++g) {
    std::fill_n(totals.head, tiles, 0.0);
    for (int64_t p = 0; p < count; ++p) {
      const int64_t i = (g * count + p) * s.tiles;
      add_masses(memory.highest + i, memory.sums + i, tiles, probes.count(p), totals.head);
    }
    for (int64_t n = 0; n < tiles; ++n) {
      const double head = totals.head[n];
      totals.all[n] += head;
      if (head > totals.peaks[n] || std::isnan(head)) totals.peaks[n] = head;  // NaN stays
    }
  }
}

// One tile of keys with rows and columns exchanged, short tiles padded with zeros: [D, kTile].
void collect_keys(const lemo_tile_scores_args& a, const TileSlot& tile, int64_t key_head, float* out) {
  const Span keys = {tile.start, tile.length};
  const int64_t d = a.k.shape[2];
  const int64_t first = tile.index * kTile, count = std::min(kTile, tile.length - first);
  if (count < kTile) std::fill_n(out, d * kTile, 0.0f);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t packed = keys.start + first + i;
    const float* from = row(a.k, present(a.rows) ? ints(a.rows)[packed] : packed, key_head);
    for (int64_t c = 0; c < d; ++c) out[c * kTile + i] = from[c];
  }
}

// The query tiles of the strip and the key tiles that they see, each by ascending slot.
struct Work {
  std::vector<TileSlot> queries, keys;

  explicit Work(const lemo_tile_scores_args& a) {
    const int64_t first = a.first_slot, last = first + a.scores.shape[0];
    int64_t document = -1, end = 0;  // the document that `end`, its first slot after those that are needed, belongs to
    for_each_tile(a.cu_seqlens, [&](const TileSlot& tile) {
      if (tile.document != document) {
        document = tile.document;
        const int64_t base = tile.slot, tiles = (tile.length + kTile - 1) / kTile;
        end = base + tiles <= first ? base : std::min(base + tiles, last);
      }
      if (tile.slot >= end) return;
      keys.push_back(tile);
      if (tile.slot >= first) queries.push_back(tile);
    });
  }
};

}  // namespace

void tile_scores(const lemo_exec& exec, const lemo_tile_scores_args& a) {
  const Sizes s(a);
  const Work work(a);
  const auto num_keys = static_cast<int64_t>(work.keys.size()), num_queries = static_cast<int64_t>(work.queries.size());
  const int64_t rows = s.group * a.probes, tile_size = s.d * kTile;
  const Scratch scratch(exec, num_queries, "q", Probes::floats(s, rows));
  const int64_t workers = worker_count(exec, num_queries);
  std::vector<double> totals(static_cast<size_t>((Size(workers) * Totals::kArrays * s.tiles).count("scores")));
  const int64_t slots = (present(a.rows) ? a.rows.shape[0] : a.q.shape[0]) / kTile + a.cu_seqlens.shape[0] - 1;
  auto* keys = static_cast<float*>(exec.workspace);  // [Hk, slots, D, kTile]; slots without a tile stay unused

  for (int64_t i = 0; i < a.scores.shape[0]; ++i) {
    std::fill_n(row(a.scores, i), a.scores.shape[1], 0.0f);
    if (present(a.peaks)) std::fill_n(row(a.peaks, i), a.peaks.shape[1], 0.0f);
  }
  parallel_for(exec, s.key_heads * num_keys, [&](int64_t task) {
    const int64_t head = task / num_keys;
    const TileSlot& tile = work.keys[static_cast<size_t>(task % num_keys)];
    collect_keys(a, tile, head, keys + (head * slots + tile.slot) * tile_size);
  });
  parallel_for(exec, num_queries, [&](int64_t task, int worker) {
    // The tiles that see most first, so that no thread is left with one at the end.
    const TileSlot& tile = work.queries[static_cast<size_t>(num_queries - 1 - task)];
    const ProbeRows probes(std::min(kTile, tile.length - tile.index * kTile), a.probes);
    const Probes memory(scratch.of(worker), s, rows);
    const Totals total(totals.data() + worker * Totals::kArrays * s.tiles, s.tiles);
    std::fill_n(total.all, tile.index + 1, 0.0);
    std::fill_n(total.peaks, tile.index + 1, 0.0);
    for (int64_t head = 0; head < s.key_heads; ++head) {
      const float* own = keys + (head * slots + tile.slot - tile.index) * tile_size;
      add_group(a, s, tile, probes, head, own, memory, total);
    }
    const double probe_share = 1.0 / a.probes, share = probe_share / static_cast<double>(a.q.shape[1]);
    float* out = row(a.scores, tile.slot - a.first_slot);
    for (int64_t n = 0; n <= tile.index; ++n) out[n] = static_cast<float>(share * total.all[n]);
    if (!present(a.peaks)) return;
    out = row(a.peaks, tile.slot - a.first_slot);
    for (int64_t n = 0; n <= tile.index; ++n) out[n] = static_cast<float>(probe_share * total.peaks[n]);
  });
}

uint64_t tile_scores_workspace(const lemo_exec&, const lemo_tile_scores_args& a) {
  return Sizes(a).key_floats(a).floats("k");
}

}  // namespace lemo::ref
