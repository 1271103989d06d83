// Valid random arguments of every operation.
#pragma once

#include <limits>
#include <string>

#include "lemo/operations.h"
#include "memory.h"

namespace fuzz {

// A packed batch: documents of blocks, and a kept list of some of the blocks.
struct Packing {
  int32_t block_size = 1;
  std::vector<int32_t> offsets{0}, documents{0};
  std::vector<int32_t> rows, row_slots, cu_seqlens{0};  // of the kept blocks
  int32_t kept = 0, longest = 0;

  Packing(Random& random, int64_t most_blocks, int64_t largest_block) {
    block_size = static_cast<int32_t>(random.in(1, largest_block));
    const int64_t keep = random.in(0, 3);  // of 3
    for (int64_t d = random.in(1, 3); d > 0; --d) {
      for (int64_t n = random.in(1, most_blocks); n > 0; --n) {
        const auto tokens = n > 1 ? block_size : static_cast<int32_t>(random.in(1, block_size));
        if (random.in(1, 3) <= keep) {
          for (int32_t i = 0; i < tokens; ++i) rows.push_back(offsets.back() + i), row_slots.push_back(kept);
          ++kept;
        }
        offsets.push_back(offsets.back() + tokens);
      }
      documents.push_back(static_cast<int32_t>(offsets.size()) - 1);
      longest = std::max(longest, static_cast<int32_t>(rows.size()) - cu_seqlens.back());
      cu_seqlens.push_back(static_cast<int32_t>(rows.size()));
    }
  }
  int64_t tokens() const { return offsets.back(); }
  int64_t num_blocks() const { return static_cast<int64_t>(offsets.size()) - 1; }

  lemo_blocks blocks(Memory& memory) const {
    lemo_blocks out = {};
    out.offsets = memory.ints(offsets);
    out.documents = memory.ints(documents);
    out.block_size = block_size;
    return out;
  }
  // Rows with padding at the end.
  void pad(Random& random) {
    for (int64_t n = random.in(0, 4); n > 0; --n) rows.push_back(-1), row_slots.push_back(-1);
  }
};

template <class Args>
struct Operation;

#define FUZZ_RUN(op)                       \
  static constexpr const char* name = #op; \
  static lemo_status run(const lemo_exec* exec, const lemo_##op##_args* args) { return lemo_##op(exec, args); }
#define FUZZ_OPERATION(op)                                                                     \
  template <>                                                                                  \
  struct Operation<lemo_##op##_args> {                                                         \
    FUZZ_RUN(op)                                                                               \
    static lemo_status workspace(const lemo_exec*, const lemo_##op##_args*, uint64_t* bytes) { \
      *bytes = 0;                                                                              \
      return LEMO_OK;                                                                          \
    }                                                                                          \
  };
#define FUZZ_OPERATION_WITH_WORKSPACE(op)                                                                \
  template <>                                                                                            \
  struct Operation<lemo_##op##_args> {                                                                   \
    FUZZ_RUN(op)                                                                                         \
    static lemo_status workspace(const lemo_exec* exec, const lemo_##op##_args* args, uint64_t* bytes) { \
      return lemo_##op##_workspace(exec, args, bytes);                                                   \
    }                                                                                                    \
  };
LEMO_OPERATIONS(FUZZ_OPERATION, FUZZ_OPERATION_WITH_WORKSPACE)
#undef FUZZ_OPERATION_WITH_WORKSPACE
#undef FUZZ_OPERATION
#undef FUZZ_RUN

inline void fill(Random& random, Memory& m, lemo_gather_args& a) {
  Packing p(random, 5, 6);
  const int64_t d = random.in(0, 40);
  p.pad(random);
  a.x = m.floats({p.tokens(), d});
  const bool identity = random.once_in(4);
  const int64_t count = identity ? p.tokens() : static_cast<int64_t>(p.rows.size());
  if (!identity) a.rows = m.ints(p.rows);
  if (!identity && p.kept > 0 && random.once_in(2)) {
    a.weights = m.tensor(LEMO_F32, {p.kept}, false);
    a.slots = m.ints(p.row_slots);
  }
  a.out = m.floats({count, d});
}

inline void fill(Random& random, Memory& m, lemo_scatter_add_args& a) {
  Packing p(random, 5, 6);
  const int64_t d = random.in(0, 40);
  p.pad(random);
  a.x = m.floats({p.tokens(), d});
  const bool identity = random.once_in(4);
  const int64_t count = identity ? p.tokens() : static_cast<int64_t>(p.rows.size());
  if (!identity) a.rows = m.ints(p.rows);
  a.y = m.floats({count, d});
  if (random.once_in(2)) a.base = m.floats({count, d});
}

inline void fill(Random& random, Memory& m, lemo_gather_norm_args& a) {
  Packing p(random, 5, 20);
  const int64_t d = random.in(1, 40);
  p.pad(random);
  a.x = m.floats({p.tokens(), d});
  const bool identity = random.once_in(4);
  const int64_t count = identity ? p.tokens() : static_cast<int64_t>(p.rows.size());
  if (!identity) a.rows = m.ints(p.rows);
  if (random.once_in(2)) a.residual = m.floats({count, d});
  if (random.once_in(2)) a.weight = m.floats({d});
  if (a.weight.ndim != 0 && random.once_in(2)) a.bias = m.floats({d});
  a.norm = static_cast<int32_t>(random.in(0, 1));
  a.eps = 1e-3f;
  a.y = m.floats({count, d});
  if (random.once_in(2)) a.packed = m.floats({count, d});
}

inline void fill(Random& random, Memory& m, lemo_gather_norm_backward_args& a) {
  Packing p(random, 5, 20);
  const int64_t d = random.in(1, 40);
  p.pad(random);
  const bool identity = random.once_in(4);
  const int64_t count = identity ? p.tokens() : static_cast<int64_t>(p.rows.size());
  a.dy = m.floats({count, d});
  a.s = m.floats({count, d});
  if (random.once_in(2)) a.weight = m.floats({d});
  if (random.once_in(2)) a.ds_extra = m.floats({count, d});
  if (!identity) a.rows = m.ints(p.rows);
  a.norm = static_cast<int32_t>(random.in(0, 1));
  a.eps = 1e-3f;
  a.accumulate = static_cast<int32_t>(random.in(0, 1));
  a.dx = m.floats({p.tokens(), d});
  if (random.once_in(2)) a.dweight = m.floats({d});
  if (random.once_in(2)) a.dbias = m.floats({d});
}

inline void fill(Random& random, Memory& m, lemo_rotary_args& a) {
  const int64_t count = random.in(0, 40), d = 2 * random.in(0, 20), heads = random.in(0, 5);
  const bool identity = random.once_in(3);
  const int64_t positions = identity ? count : random.in(1, 50);
  a.x = m.floats({count, heads, d});
  a.cos = m.floats({positions, d});
  a.sin = m.floats({positions, d});
  if (!identity) {
    std::vector<int32_t> rows;
    for (int64_t i = 0; i < count; ++i) rows.push_back(static_cast<int32_t>(random.in(-1, positions - 1)));
    a.rows = m.ints(rows);
  }
  a.inverse = static_cast<int32_t>(random.in(0, 1));
  a.out = random.once_in(4) ? a.x : m.floats({count, heads, d});
}

inline void fill(Random& random, Memory& m, lemo_swiglu_args& a) {
  const int64_t count = random.in(0, 40), f = random.in(0, random.once_in(3) ? 600 : 40);
  a.gate = m.floats({count, f});
  a.up = m.floats({count, f});
  a.out = random.once_in(4) ? random.one_of({a.gate, a.up}) : m.floats({count, f});
}

inline void fill(Random& random, Memory& m, lemo_swiglu_backward_args& a) {
  const int64_t count = random.in(0, 40), f = random.in(0, random.once_in(3) ? 600 : 40);
  a.dout = m.floats({count, f});
  a.gate = m.floats({count, f});
  a.up = m.floats({count, f});
  a.dgate = random.once_in(4) ? random.one_of({a.dout, a.gate, a.up}) : m.floats({count, f});
  a.dup = m.floats({count, f});
}

inline void fill(Random& random, Memory& m, lemo_relu_args& a) {
  const int64_t count = random.in(0, 40), f = random.in(0, random.once_in(3) ? 600 : 40);
  a.x = m.floats({count, f});
  a.out = random.once_in(4) ? a.x : m.floats({count, f});
  a.bits = m.tensor(LEMO_U8, {count, (f + 7) / 8});
}

inline void fill(Random& random, Memory& m, lemo_relu_backward_args& a) {
  const int64_t count = random.in(0, 40), f = random.in(0, random.once_in(3) ? 600 : 40);
  a.dout = m.floats({count, f});
  a.bits = m.tensor(LEMO_U8, {count, (f + 7) / 8});
  a.dx = random.once_in(4) ? a.dout : m.floats({count, f});
}

inline void fill(Random& random, Memory& m, lemo_select_args& a) {
  const Packing p(random, 8, 6);
  const int64_t n = p.num_blocks();
  std::vector<float> scores;
  for (int64_t i = 0; i < n; ++i) scores.push_back(static_cast<float>(random.in(1, 1000)) / 1000.0f);
  a.scores = m.list(LEMO_F32, scores);
  a.blocks = p.blocks(m);
  a.mode = static_cast<int32_t>(random.in(LEMO_SELECT_THRESHOLD, LEMO_SELECT_POISSON));
  a.keep = static_cast<float>(random.in(1, 10)) / 10.0f;
  a.threshold = 0.0f;
  a.always_first = static_cast<int32_t>(random.in(0, 2));
  a.always_last = static_cast<int32_t>(random.in(0, 2));
  a.seed = static_cast<uint64_t>(random.in(0, 1 << 30));
  a.kept = m.tensor(LEMO_I32, {n});
  a.slots = m.tensor(LEMO_I32, {n});
  a.row_offsets = m.tensor(LEMO_I32, {n + 1});
  a.cu_seqlens = m.tensor(LEMO_I32, {static_cast<int64_t>(p.documents.size())});
  a.rows = m.tensor(LEMO_I32, {p.tokens()});
  a.row_slots = m.tensor(LEMO_I32, {p.tokens()});
  a.weights = m.floats({n});
  a.info = m.tensor(LEMO_I32, {LEMO_INFO_SIZE});
}

inline void fill(Random& random, Memory& m, lemo_scores_args& a) {
  const Packing p(random, 6, random.once_in(4) ? 70 : 6);
  const int64_t key_heads = random.in(1, 3), d = random.in(0, 20), n = p.num_blocks();
  a.q = m.floats({p.tokens(), key_heads * random.in(1, 3), d});
  a.k = m.floats({p.tokens(), key_heads, d});
  a.blocks = p.blocks(m);
  a.scale = random.number();
  a.normalize = static_cast<int32_t>(random.in(0, 1));
  if (random.once_in(2)) a.window = random.once_in(4) ? std::numeric_limits<int64_t>::max() : random.in(1, 30);
  if (random.once_in(3)) a.softcap = 3.0f;
  a.scores = m.floats({n});
  if (random.once_in(2)) a.map = m.floats({n, n});
}

inline void fill(Random& random, Memory& m, lemo_predict_args& a) {
  const Packing p(random, 8, random.once_in(4) ? 70 : 6);
  const int64_t d = random.in(1, 40), c = random.in(0, 20), n = p.num_blocks();
  a.x = m.floats({p.tokens(), d});
  const auto network = [&](lemo_tensor& w1, lemo_tensor& w2, lemo_tensor& w3) {
    const int64_t r = random.in(0, 40), s = random.in(0, 20);
    w1 = m.floats({r, d});
    w2 = m.floats({s, r});
    w3 = m.floats({c, s});
  };
  network(a.wq1, a.wq2, a.wq3);
  network(a.wk1, a.wk2, a.wk3);
  a.blocks = p.blocks(m);
  a.norm = static_cast<int32_t>(random.in(0, 1));
  a.pool = static_cast<int32_t>(random.in(0, 1));
  a.eps = 1e-3f;
  a.normalize = static_cast<int32_t>(random.in(0, 1));
  a.scores = m.floats({n});
  if (random.once_in(2)) a.queries = m.floats({n, c});
  if (random.once_in(2)) a.keys = m.floats({n, c});
}

// What both passes of attention share.
struct Attention {
  Packing packing;
  bool packed;  // without a list of rows
  int64_t key_heads, query_heads, d, storage, capacity;
  lemo_tensor cu_seqlens, rows{}, tile_offsets{}, tiles{};
  // Of keys: those of the queries, or separate ones.
  int64_t key_storage, key_capacity, longest_k = 0;
  lemo_tensor cu_seqlens_k{}, rows_k{};
  // Options.
  int64_t window = 0;
  float softcap = 0;
  lemo_tensor places{}, places_k{}, sinks{};

  Attention(Random& random, Memory& m, bool transposed) : packing(random, 4, random.once_in(4) ? 200 : 20) {
    packed = random.once_in(3);
    key_heads = random.in(1, 2);
    query_heads = key_heads * random.in(1, 2);
    d = random.in(1, 24);
    const auto count = static_cast<int64_t>(packing.rows.size());
    if (!packed) packing.pad(random);
    storage = packed ? count + random.in(0, 3) : packing.tokens();
    capacity = packed ? storage : static_cast<int64_t>(packing.rows.size());
    cu_seqlens = m.ints(packing.cu_seqlens);
    if (!packed) rows = m.ints(packing.rows);
    key_storage = storage;
    key_capacity = capacity;
    if (random.once_in(2)) {
      lists(random, m, transposed);
    } else if (random.once_in(2)) {
      separate_keys(random, m);
    }
    options(random, m);
  }

  void options(Random& random, Memory& m) {
    if (random.once_in(3)) softcap = 3.0f;
    if (random.once_in(3)) sinks = m.floats({query_heads});
    if (tiles.ndim != 0 || random.once_in(2)) return;
    window = random.once_in(4) ? std::numeric_limits<int64_t>::max() : random.in(1, 60);
    const bool separate = cu_seqlens_k.ndim != 0;
    const auto list = [&](int64_t size) {
      std::vector<int32_t> numbers;
      for (int64_t i = 0; i < size; ++i) {
        numbers.push_back(static_cast<int32_t>(random.in(1, 3)) + (numbers.empty() ? -1 : numbers.back()));
      }
      return m.ints(numbers);
    };
    if (!separate && random.once_in(2)) return;
    places = list(capacity);
    if (separate) places_k = list(key_capacity);
  }

  void separate_keys(Random& random, Memory& m) {
    std::vector<int32_t> starts = {0}, key_rows;
    for (size_t d = 1; d < packing.cu_seqlens.size(); ++d) {
      const auto length = static_cast<int32_t>(random.once_in(4) ? 0 : random.in(0, random.once_in(4) ? 300 : 30));
      longest_k = std::max<int64_t>(longest_k, length);
      starts.push_back(starts.back() + length);
    }
    key_storage = key_capacity = starts.back() + random.in(0, 3);
    cu_seqlens_k = m.ints(starts);
    if (random.once_in(2)) return;
    int32_t next = 0;
    for (int32_t i = 0; i < starts.back(); ++i, ++next) {
      next += static_cast<int32_t>(random.in(0, 1));
      key_rows.push_back(next);
    }
    key_storage = next + random.in(0, 3);
    for (int64_t n = random.in(0, 4); n > 0; --n) key_rows.push_back(-1);
    key_capacity = static_cast<int64_t>(key_rows.size());
    rows_k = m.ints(key_rows);
  }

  void lists(Random& random, Memory& m, bool transposed) {
    const auto documents = static_cast<int64_t>(packing.cu_seqlens.size()) - 1;
    const int64_t slots = capacity / LEMO_TILE_ROWS + documents;
    std::vector<int32_t> offsets, entries;
    int64_t next = 0;
    for (int64_t d = 0; d < documents; ++d) {
      const int32_t begin = packing.cu_seqlens[static_cast<size_t>(d)];
      const int32_t length = packing.cu_seqlens[static_cast<size_t>(d + 1)] - begin;
      const int64_t first = begin / LEMO_TILE_ROWS + d, count = (length + LEMO_TILE_ROWS - 1) / LEMO_TILE_ROWS;
      for (; next < first; ++next) offsets.push_back(static_cast<int32_t>(entries.size()));
      for (int64_t tile = 0; tile < count; ++tile, ++next) {
        offsets.push_back(static_cast<int32_t>(entries.size()));
        for (int64_t other = transposed ? tile + 1 : 0; other < (transposed ? count : tile); ++other) {
          if (random.once_in(2)) entries.push_back(static_cast<int32_t>(other));
        }
      }
    }
    for (; next <= slots; ++next) offsets.push_back(static_cast<int32_t>(entries.size()));
    tile_offsets = m.ints(offsets);
    tiles = m.ints(entries);
  }
};

inline void fill(Random& random, Memory& m, lemo_attention_forward_args& a) {
  const Attention t(random, m, false);
  a.q = m.floats({t.storage, t.query_heads, t.d});
  a.k = m.floats({t.key_storage, t.key_heads, t.d});
  a.v = m.floats({t.key_storage, t.key_heads, t.d});
  a.cu_seqlens = t.cu_seqlens;
  a.rows = t.rows;
  a.max_seqlen = t.packing.longest;
  a.scale = random.number();
  a.softcap = t.softcap;
  a.window = t.window;
  a.places = t.places;
  a.places_k = t.places_k;
  a.sinks = t.sinks;
  a.out = m.floats({t.storage, t.query_heads, t.d});
  a.lse = m.floats({t.query_heads, t.capacity});
  a.tile_offsets = t.tile_offsets;
  a.tiles = t.tiles;
  a.cu_seqlens_k = t.cu_seqlens_k;
  a.rows_k = t.rows_k;
  a.max_seqlen_k = t.longest_k;
}

inline void fill(Random& random, Memory& m, lemo_attention_backward_args& a) {
  const Attention t(random, m, true);
  a.dout = m.floats({t.storage, t.query_heads, t.d});
  a.q = m.floats({t.storage, t.query_heads, t.d});
  a.k = m.floats({t.key_storage, t.key_heads, t.d});
  a.v = m.floats({t.key_storage, t.key_heads, t.d});
  a.out = m.floats({t.storage, t.query_heads, t.d});
  a.lse = m.floats({t.query_heads, t.capacity});
  a.cu_seqlens = t.cu_seqlens;
  a.rows = t.rows;
  if (!t.packed && random.once_in(2)) {
    a.key_weights = m.tensor(LEMO_F32, {t.packing.kept}, false);
    a.row_slots = m.ints(t.packing.row_slots);
    if (t.cu_seqlens_k.ndim != 0) {
      std::vector<int32_t> slots;
      for (int64_t i = 0; i < t.key_capacity; ++i) {
        slots.push_back(static_cast<int32_t>(random.in(0, std::max<int64_t>(t.packing.kept, 1) - 1)));
      }
      if (t.packing.kept == 0) a.key_weights = m.tensor(LEMO_F32, {1}, false);
      a.row_slots_k = m.ints(slots);
    }
  }
  a.max_seqlen = t.packing.longest;
  a.scale = 0.1f;
  a.softcap = t.softcap;
  a.window = t.window;
  a.places = t.places;
  a.places_k = t.places_k;
  a.sinks = t.sinks;
  if (t.sinks.ndim != 0 && random.once_in(2)) a.dsinks = m.floats({t.query_heads});
  a.dq = m.floats({t.storage, t.query_heads, t.d});
  a.dk = m.floats({t.key_storage, t.key_heads, t.d});
  a.dv = m.floats({t.key_storage, t.key_heads, t.d});
  a.tile_offsets = t.tile_offsets;
  a.tiles = t.tiles;
  a.cu_seqlens_k = t.cu_seqlens_k;
  a.rows_k = t.rows_k;
  a.max_seqlen_k = t.longest_k;
}

inline void fill(Random& random, Memory& m, lemo_tile_scores_args& a) {
  Packing p(random, 4, random.once_in(3) ? 200 : 20);
  const bool packed = random.once_in(3);
  const int64_t key_heads = random.in(1, 2), d = random.in(1, 24), count = static_cast<int64_t>(p.rows.size());
  if (!packed) p.pad(random);
  const int64_t storage = packed ? count + random.in(0, 3) : p.tokens();
  const int64_t capacity = packed ? storage : static_cast<int64_t>(p.rows.size());
  const int64_t slots = capacity / LEMO_TILE_ROWS + static_cast<int64_t>(p.cu_seqlens.size()) - 1;
  a.q = m.floats({storage, key_heads * random.in(1, 2), d});
  a.k = m.floats({storage, key_heads, d});
  a.cu_seqlens = m.ints(p.cu_seqlens);
  if (!packed) a.rows = m.ints(p.rows);
  a.max_seqlen = p.longest;
  a.first_slot = random.in(0, slots);
  a.scale = 0.1f;
  a.probes = static_cast<int32_t>(random.once_in(4) ? LEMO_TILE_ROWS : random.in(1, 4));
  a.scores = m.floats(
      {random.in(0, slots - a.first_slot), (p.longest + LEMO_TILE_ROWS - 1) / LEMO_TILE_ROWS + random.in(0, 2)});
  if (random.once_in(2)) a.peaks = m.floats({a.scores.shape[0], a.scores.shape[1]});
}

// Documents of a few tiles, and slots for these.
struct Tiles {
  std::vector<int32_t> cu_seqlens{0};
  int64_t longest = 0, slots = 0;  // tiles of the longest document

  explicit Tiles(Random& random) {
    for (int64_t d = random.in(1, 4); d > 0; --d) {
      const int64_t length = random.once_in(4) ? 0 : random.in(1, random.once_in(3) ? 6000 : 600);
      cu_seqlens.push_back(cu_seqlens.back() + static_cast<int32_t>(length));
      longest = std::max(longest, (length + LEMO_TILE_ROWS - 1) / LEMO_TILE_ROWS);
    }
    slots = cu_seqlens.back() / LEMO_TILE_ROWS + static_cast<int64_t>(cu_seqlens.size()) - 1 + random.in(0, 2);
  }
};

inline void fill(Random& random, Memory& m, lemo_select_tiles_args& a) {
  const Tiles t(random);
  a.first_slot = random.in(0, t.slots);
  const int64_t count = random.in(0, t.slots - a.first_slot), width = t.longest + random.in(0, 3);
  a.scores = m.floats({count, width});
  a.cu_seqlens = m.ints(t.cu_seqlens);
  a.keys = random.in(1, 3000);
  a.density = static_cast<float>(random.in(1, 10)) / 10.0f;
  a.mass = static_cast<float>(random.in(1, 20)) / 10.0f;
  a.first = static_cast<int32_t>(random.in(0, 2));
  a.local = static_cast<int32_t>(random.in(0, 2));
  a.chosen = m.tensor(LEMO_I32, {t.slots, (width + 31) / 32 + random.in(0, 1)});
  if (random.once_in(2)) a.covered = m.tensor(LEMO_F32, {count});
  if (random.once_in(2)) a.masses = m.floats({count, width});
}

inline void fill(Random& random, Memory& m, lemo_list_tiles_args& a) {
  const Tiles t(random);
  a.cu_seqlens = m.ints(t.cu_seqlens);
  a.chosen = m.tensor(LEMO_I32, {t.slots, (t.longest + 31) / 32});
  auto* words = static_cast<uint32_t*>(a.chosen.data);
  const auto row = [&](int64_t slot) { return words + slot * a.chosen.stride[0]; };
  for (int64_t s = 0; s < t.slots; ++s) std::fill_n(row(s), a.chosen.shape[1], 0u);
  int64_t count = 0;
  for (size_t d = 0; d + 1 < t.cu_seqlens.size(); ++d) {
    const int64_t begin = t.cu_seqlens[d], first = begin / LEMO_TILE_ROWS + static_cast<int64_t>(d);
    for (int64_t tile = 0; begin + tile * LEMO_TILE_ROWS < t.cu_seqlens[d + 1]; ++tile) {
      for (int64_t n = 0; n < tile; ++n) {
        if (random.once_in(2)) row(first + tile)[n / 32] |= 1u << (n % 32), ++count;
      }
    }
  }
  const int64_t entries = count + random.in(0, 5);
  a.tile_offsets = m.tensor(LEMO_I32, {t.slots + 1});
  a.tiles = m.tensor(LEMO_I32, {entries});
  a.transposed_offsets = m.tensor(LEMO_I32, {t.slots + 1});
  a.transposed_tiles = m.tensor(LEMO_I32, {entries});
}

inline void fill(Random& random, Memory& m, lemo_linear_cross_entropy_args& a) {
  const int64_t n = random.in(0, 30), d = random.in(0, 40), v = random.in(1, 150), r = random.in(0, 5);
  std::vector<int64_t> targets;
  for (int64_t i = 0; i < n; ++i) targets.push_back(random.once_in(3) ? -100 : random.in(0, v - 1));
  a.hidden = m.floats({n, d});
  a.weight = m.floats({v, d});
  if (random.once_in(2)) a.bias = m.floats({v});
  const bool lora = random.once_in(2);
  if (lora) {
    a.lora_a = m.floats({r, d});
    a.lora_b = m.floats({v, r});
    a.lora_scale = random.number();
  }
  a.targets = m.list(LEMO_I64, targets);
  a.ignore_index = -100;
  a.softcap = random.once_in(2) ? 4.0f : 0.0f;
  a.reduction = static_cast<int32_t>(random.in(0, 1));
  a.segment_rows = static_cast<int32_t>(random.in(0, 10));
  a.loss = m.floats({1});
  a.valid = m.tensor(LEMO_I64, {1});
  if (random.once_in(2)) a.dhidden = random.once_in(4) ? a.hidden : m.floats({n, d});
  if (random.once_in(2)) a.dweight = m.floats({v, d});
  if (random.once_in(2)) a.dbias = m.floats({v});
  if (lora && random.once_in(2)) a.dlora_a = m.floats({r, d});
  if (lora && random.once_in(2)) a.dlora_b = m.floats({v, r});
}

}  // namespace fuzz
