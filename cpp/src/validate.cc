#include "src/validate.h"

#include <cmath>

#include "src/checker.h"

namespace lemo {
namespace {

void check_range(const char* name, bool ok, const char* expected, double got) {
  if (ok) return;
  std::string text = std::to_string(got);
  if (text.find('.') != std::string::npos) {
    text.erase(text.find_last_not_of('0') + 1);
    if (text.back() == '.') text.pop_back();
  }
  invalid(std::string(name) + ": expected " + expected + ", got " + text);
}

void check_flag(const char* name, int32_t value) { check_range(name, value == 0 || value == 1, "0 or 1", value); }

void check_rows_fit(const char* name, int64_t rows) {
  check_range(name, rows <= kMaxRows, "at most 2^31 - 1 rows (row numbers are int32)", static_cast<double>(rows));
}

// For lists whose entries are numbered by int32.
void check_list_fits(const char* name, const lemo_tensor& list) {
  check_range(name, list.shape[0] <= kMaxRows, "at most 2^31 - 1 entries (they are numbered by int32)",
              static_cast<double>(list.shape[0]));
}

void check_norm(int32_t norm, float eps) {
  check_range("norm", norm == LEMO_NORM_RMS || norm == LEMO_NORM_LAYER, "LEMO_NORM_RMS (0) or LEMO_NORM_LAYER (1)",
              norm);
  check_range("eps", std::isfinite(eps) && eps >= 0, "a finite number of at least 0", eps);
}

void check_scale(float scale) { check_range("scale", std::isfinite(scale), "a finite number", scale); }

void check_softcap(float softcap) {
  check_range("softcap", std::isfinite(softcap) && softcap >= 0, "a finite number of at least 0", softcap);
}

void check_window(int64_t window) {
  check_range("window", window >= 0, "at least 0 (0: no window)", static_cast<double>(window));
}

// Returns the number of blocks.
int64_t check_blocks(const Checker& check, const lemo_blocks& blocks, int64_t num_tokens) {
  check.typed("offsets", blocks.offsets, LEMO_I32, {{"num_blocks + 1", kAny}});
  check.typed("documents", blocks.documents, LEMO_I32, {{"D + 1", kAny}});
  check_list_fits("offsets", blocks.offsets);
  check_list_fits("documents", blocks.documents);
  check_range("block_size", blocks.block_size >= 1, "at least 1", blocks.block_size);
  check_range("offsets", blocks.offsets.shape[0] >= 2, "at least one block, so 2 entries or more",
              static_cast<double>(blocks.offsets.shape[0]));
  check_range("documents", blocks.documents.shape[0] >= 2, "at least one document, so 2 entries or more",
              static_cast<double>(blocks.documents.shape[0]));
  if (check.values()) check_blocks_values(blocks, num_tokens);
  return blocks.offsets.shape[0] - 1;
}

void check_heads(int64_t query_heads, int64_t key_heads) {
  if (key_heads < 1 || query_heads < 1 || query_heads % key_heads != 0) {
    invalid("k: expected a number of key heads that divides the " + std::to_string(query_heads) + " query heads, got " +
            std::to_string(key_heads));
  }
}

}  // namespace

void validate_exec(const lemo_exec& exec) {
  check_range("exec.device", exec.device == LEMO_CPU || exec.device == LEMO_CUDA, "LEMO_CPU (0) or LEMO_CUDA (1)",
              exec.device);
  check_range("exec.num_threads", exec.num_threads >= 0, "at least 0 (0 = all cores)", exec.num_threads);
  check_range("exec.device_index", exec.device == LEMO_CPU || exec.device_index >= 0, "at least 0", exec.device_index);
  check_flag("exec.deterministic", exec.deterministic);
}

void validate(const lemo_exec& exec, const lemo_gather_args& a, Purpose purpose) {
  const Checker check(exec, purpose);
  check.data("x", a.x, {{"T", kAny}, {"d", kAny}});
  check.width("x", a.x);
  check_rows_fit("x", a.x.shape[0]);
  const bool identity = !present(a.rows);
  const int64_t m = identity ? a.x.shape[0] : a.rows.shape[0];
  if (!identity) {
    check.typed("rows", a.rows, LEMO_I32, {{"M", m}});
    check_list_fits("rows", a.rows);
  }
  check.like("out", a.out, "x", a.x, {{"M", m}, {"d", a.x.shape[1]}}, Role::kOutput);
  if (present(a.weights)) {
    check.typed("weights", a.weights, LEMO_F32, {{"K", kAny}});
    check_list_fits("weights", a.weights);
    check.typed("slots", a.slots, LEMO_I32, {{"M", m}});
  } else if (present(a.slots)) {
    invalid("slots: expected weights with it, got no tensor for weights");
  }
  if (!check.values()) return;
  if (!identity) check_rows_values(a.rows, m, a.x.shape[0], true, false);
  if (present(a.weights)) check_slots_values("slots", a.slots, m, a.weights.shape[0], a.rows);
}

void validate(const lemo_exec& exec, const lemo_scatter_add_args& a, Purpose purpose) {
  const Checker check(exec, purpose);
  check.data("x", a.x, {{"T", kAny}, {"d", kAny}}, Role::kOutput);
  check.width("x", a.x);
  check_rows_fit("x", a.x.shape[0]);
  const bool identity = !present(a.rows);
  const int64_t m = identity ? a.x.shape[0] : a.rows.shape[0];
  if (!identity) {
    check.typed("rows", a.rows, LEMO_I32, {{"M", m}});
    check_list_fits("rows", a.rows);
  }
  check.like("y", a.y, "x", a.x, {{"M", m}, {"d", a.x.shape[1]}});
  if (present(a.base)) check.like("base", a.base, "x", a.x, {{"M", m}, {"d", a.x.shape[1]}});
  if (check.values() && !identity) check_rows_values(a.rows, m, a.x.shape[0], true, true);
}

void validate(const lemo_exec& exec, const lemo_gather_norm_args& a, Purpose purpose) {
  const Checker check(exec, purpose);
  check.data("x", a.x, {{"T", kAny}, {"d", kAny}});
  check.width("x", a.x);
  check_rows_fit("x", a.x.shape[0]);
  const bool identity = !present(a.rows);
  const int64_t m = identity ? a.x.shape[0] : a.rows.shape[0];
  const int64_t d = a.x.shape[1];
  if (!identity) {
    check.typed("rows", a.rows, LEMO_I32, {{"M", m}});
    check_list_fits("rows", a.rows);
  }
  if (present(a.residual)) check.like("residual", a.residual, "x", a.x, {{"M", m}, {"d", d}});
  if (present(a.weight)) {
    if (a.weight.dtype == LEMO_F32) {
      check.typed("weight", a.weight, LEMO_F32, {{"d", d}});
    } else {
      check.like("weight", a.weight, "x (or float32)", a.x, {{"d", d}});
    }
  }
  if (present(a.bias)) {
    if (!present(a.weight)) invalid("bias: expected a weight with it, got no tensor for weight");
    check.like("bias", a.bias, "weight", a.weight, {{"d", d}});
  }
  check_norm(a.norm, a.eps);
  check.like("y", a.y, "x", a.x, {{"M", m}, {"d", d}}, Role::kOutput);
  if (present(a.packed)) check.like("packed", a.packed, "x", a.x, {{"M", m}, {"d", d}}, Role::kOutput);
  if (check.values() && !identity) check_rows_values(a.rows, m, a.x.shape[0], true, false);
}

void validate(const lemo_exec& exec, const lemo_gather_norm_backward_args& a, Purpose purpose) {
  const Checker check(exec, purpose);
  check.data("dy", a.dy, {{"M", kAny}, {"d", kAny}});
  check.width("dy", a.dy);
  check_rows_fit("dy", a.dy.shape[0]);
  const int64_t m = a.dy.shape[0];
  const int64_t d = a.dy.shape[1];
  check.like("s", a.s, "dy", a.dy, {{"M", m}, {"d", d}});
  if (present(a.weight)) {
    if (a.weight.dtype == LEMO_F32) {
      check.typed("weight", a.weight, LEMO_F32, {{"d", d}});
    } else {
      check.like("weight", a.weight, "dy (or float32)", a.dy, {{"d", d}});
    }
  }
  if (present(a.ds_extra)) check.like("ds_extra", a.ds_extra, "dy", a.dy, {{"M", m}, {"d", d}});
  check_norm(a.norm, a.eps);
  check_flag("accumulate", a.accumulate);
  if (present(a.rows)) {
    check.typed("rows", a.rows, LEMO_I32, {{"M", m}});
    check.like("dx", a.dx, "dy", a.dy, {{"T", kAny}, {"d", d}}, Role::kOutput);
    check_rows_fit("dx", a.dx.shape[0]);
  } else {
    check.like("dx", a.dx, "dy", a.dy, {{"M", m}, {"d", d}}, Role::kOutput);
  }
  if (present(a.dweight)) check.typed("dweight", a.dweight, LEMO_F32, {{"d", d}}, Role::kOutput);
  if (present(a.dbias)) check.typed("dbias", a.dbias, LEMO_F32, {{"d", d}}, Role::kOutput);
  if (check.values() && present(a.rows)) check_rows_values(a.rows, m, a.dx.shape[0], true, true);
}

void validate(const lemo_exec& exec, const lemo_rotary_args& a, Purpose purpose) {
  const Checker check(exec, purpose);
  check.data("x", a.x, {{"M", kAny}, {"H", kAny}, {"D", kAny}});
  const int64_t m = a.x.shape[0], d = a.x.shape[2];
  check_rows_fit("x", m);
  check_range("x", d % 2 == 0, "an even head dimension", static_cast<double>(d));
  const bool identity = !present(a.rows);
  const Dim positions = identity ? Dim{"T=M", m} : Dim{"T", kAny};
  if (a.cos.dtype == LEMO_F32) {
    check.typed("cos", a.cos, LEMO_F32, {positions, {"D", d}});
  } else {
    check.like("cos", a.cos, "x (or float32)", a.x, {positions, {"D", d}});
  }
  check_rows_fit("cos", a.cos.shape[0]);
  check.like("sin", a.sin, "cos", a.cos, {{"T", a.cos.shape[0]}, {"D", d}});
  if (!identity) check.typed("rows", a.rows, LEMO_I32, {{"M", m}});
  check_flag("inverse", a.inverse);
  check.like("out", a.out, "x", a.x, {{"M", m}, {"H", a.x.shape[1]}, {"D", d}}, Role::kOutput);
  if (check.values() && !identity) check_rows_values(a.rows, m, a.cos.shape[0], true, false);
}

void validate(const lemo_exec& exec, const lemo_swiglu_args& a, Purpose purpose) {
  const Checker check(exec, purpose);
  check.data("gate", a.gate, {{"M", kAny}, {"f", kAny}});
  check.width("gate", a.gate, "f");
  const int64_t m = a.gate.shape[0], f = a.gate.shape[1];
  check.like("up", a.up, "gate", a.gate, {{"M", m}, {"f", f}});
  check.like("out", a.out, "gate", a.gate, {{"M", m}, {"f", f}}, Role::kOutput);
}

void validate(const lemo_exec& exec, const lemo_swiglu_backward_args& a, Purpose purpose) {
  const Checker check(exec, purpose);
  check.data("dout", a.dout, {{"M", kAny}, {"f", kAny}});
  check.width("dout", a.dout, "f");
  const int64_t m = a.dout.shape[0], f = a.dout.shape[1];
  check.like("gate", a.gate, "dout", a.dout, {{"M", m}, {"f", f}});
  check.like("up", a.up, "dout", a.dout, {{"M", m}, {"f", f}});
  check.like("dgate", a.dgate, "dout", a.dout, {{"M", m}, {"f", f}}, Role::kOutput);
  check.like("dup", a.dup, "dout", a.dout, {{"M", m}, {"f", f}}, Role::kOutput);
}

void validate(const lemo_exec& exec, const lemo_relu_args& a, Purpose purpose) {
  const Checker check(exec, purpose);
  check.data("x", a.x, {{"M", kAny}, {"f", kAny}});
  check.width("x", a.x, "f");
  const int64_t m = a.x.shape[0], f = a.x.shape[1];
  check.like("out", a.out, "x", a.x, {{"M", m}, {"f", f}}, Role::kOutput);
  check.typed("bits", a.bits, LEMO_U8, {{"M", m}, {"ceil(f / 8)", (f + 7) / 8}}, Role::kOutput);
}

void validate(const lemo_exec& exec, const lemo_relu_backward_args& a, Purpose purpose) {
  const Checker check(exec, purpose);
  check.data("dout", a.dout, {{"M", kAny}, {"f", kAny}});
  check.width("dout", a.dout, "f");
  const int64_t m = a.dout.shape[0], f = a.dout.shape[1];
  check.typed("bits", a.bits, LEMO_U8, {{"M", m}, {"ceil(f / 8)", (f + 7) / 8}});
  check.like("dx", a.dx, "dout", a.dout, {{"M", m}, {"f", f}}, Role::kOutput);
}

void validate(const lemo_exec& exec, const lemo_select_args& a, Purpose purpose) {
  const Checker check(exec, purpose);
  check.typed("scores", a.scores, LEMO_F32, {{"num_blocks", kAny}});
  const int64_t tokens = present(a.rows) ? a.rows.shape[0] : kAny;
  const int64_t n = check_blocks(check, a.blocks, tokens);
  check.typed("scores", a.scores, LEMO_F32, {{"num_blocks", n}});
  check_range("mode", a.mode >= LEMO_SELECT_THRESHOLD && a.mode <= LEMO_SELECT_POISSON,
              "LEMO_SELECT_THRESHOLD (0), LEMO_SELECT_BUDGET (1), LEMO_SELECT_SAMPLE (2) or LEMO_SELECT_POISSON (3)",
              a.mode);
  if (a.mode == LEMO_SELECT_THRESHOLD) {
    check_range("threshold", !std::isnan(a.threshold), "a number", a.threshold);
  } else {
    check_range("keep", a.keep > 0 && a.keep <= 1, "a fraction in (0, 1]", a.keep);
  }
  check_range("always_first", a.always_first >= 0, "at least 0", a.always_first);
  check_range("always_last", a.always_last >= 0, "at least 0", a.always_last);
  check.typed("kept", a.kept, LEMO_I32, {{"num_blocks", n}}, Role::kOutput);
  check.typed("slots", a.slots, LEMO_I32, {{"num_blocks", n}}, Role::kOutput);
  check.typed("row_offsets", a.row_offsets, LEMO_I32, {{"num_blocks + 1", n + 1}}, Role::kOutput);
  check.typed("cu_seqlens", a.cu_seqlens, LEMO_I32, {{"D + 1", a.blocks.documents.shape[0]}}, Role::kOutput);
  check.typed("rows", a.rows, LEMO_I32, {{"T", kAny}}, Role::kOutput);
  check.typed("row_slots", a.row_slots, LEMO_I32, {{"T", a.rows.shape[0]}}, Role::kOutput);
  check.typed("weights", a.weights, LEMO_F32, {{"num_blocks", n}}, Role::kOutput);
  check.typed("info", a.info, LEMO_I32, {{"4", LEMO_INFO_SIZE}}, Role::kOutput);
  check_rows_fit("rows", a.rows.shape[0]);
}

void validate(const lemo_exec& exec, const lemo_scores_args& a, Purpose purpose) {
  const Checker check(exec, purpose);
  check.data("q", a.q, {{"T", kAny}, {"Hq", kAny}, {"D", kAny}});
  const int64_t t = a.q.shape[0];
  check_rows_fit("q", t);
  check.like("k", a.k, "q", a.q, {{"T", t}, {"Hk", kAny}, {"D", a.q.shape[2]}});
  check_heads(a.q.shape[1], a.k.shape[1]);
  const int64_t n = check_blocks(check, a.blocks, t);
  check_scale(a.scale);
  check_softcap(a.softcap);
  check_window(a.window);
  check_flag("normalize", a.normalize);
  check.typed("scores", a.scores, LEMO_F32, {{"num_blocks", n}}, Role::kOutput);
  if (present(a.map)) check.typed("map", a.map, LEMO_F32, {{"num_blocks", n}, {"num_blocks", n}}, Role::kOutput);
}

void validate(const lemo_exec& exec, const lemo_predict_args& a, Purpose purpose) {
  const Checker check(exec, purpose);
  check.data("x", a.x, {{"T", kAny}, {"d", kAny}});
  check.width("x", a.x);
  check_rows_fit("x", a.x.shape[0]);
  check.like("wq1", a.wq1, "x", a.x, {{"rq", kAny}, {"d", a.x.shape[1]}});
  check.like("wq2", a.wq2, "x", a.x, {{"sq", kAny}, {"rq", a.wq1.shape[0]}});
  check.like("wq3", a.wq3, "x", a.x, {{"c", kAny}, {"sq", a.wq2.shape[0]}});
  const int64_t c = a.wq3.shape[0];
  check.like("wk1", a.wk1, "x", a.x, {{"rk", kAny}, {"d", a.x.shape[1]}});
  check.like("wk2", a.wk2, "x", a.x, {{"sk", kAny}, {"rk", a.wk1.shape[0]}});
  check.like("wk3", a.wk3, "x", a.x, {{"c", c}, {"sk", a.wk2.shape[0]}});
  const int64_t n = check_blocks(check, a.blocks, a.x.shape[0]);
  check_norm(a.norm, a.eps);
  check_range("pool", a.pool == LEMO_POOL_MEAN || a.pool == LEMO_POOL_MAX, "LEMO_POOL_MEAN (0) or LEMO_POOL_MAX (1)",
              a.pool);
  check_flag("normalize", a.normalize);
  check.typed("scores", a.scores, LEMO_F32, {{"num_blocks", n}}, Role::kOutput);
  if (present(a.queries)) check.typed("queries", a.queries, LEMO_F32, {{"num_blocks", n}, {"c", c}}, Role::kOutput);
  if (present(a.keys)) check.typed("keys", a.keys, LEMO_F32, {{"num_blocks", n}, {"c", c}}, Role::kOutput);
}

namespace {

// The packed rows of one side of attention: `side` ends the arguments' names ("" or "_k"), `data` is the tensor whose
// storage they name. Returns the capacity.
int64_t check_packed_rows(const Checker& check, const std::string& side, const lemo_tensor& data,
                          const lemo_tensor& cu_seqlens, Dim documents, const lemo_tensor& rows, int64_t max_seqlen) {
  const std::string cu_name = "cu_seqlens" + side, rows_name = "rows" + side, max_name = "max_seqlen" + side;
  check.typed(cu_name.c_str(), cu_seqlens, LEMO_I32, {documents});
  check_range(cu_name.c_str(), cu_seqlens.shape[0] >= 2, "at least one document, so 2 entries or more",
              static_cast<double>(cu_seqlens.shape[0]));
  check_list_fits(cu_name.c_str(), cu_seqlens);
  if (present(rows)) {
    check.typed(rows_name.c_str(), rows, LEMO_I32, {{side.empty() ? "capacity" : "capacity_k", kAny}});
    check_list_fits(rows_name.c_str(), rows);
  }
  check_range(max_name.c_str(), max_seqlen >= 0, "at least 0", static_cast<double>(max_seqlen));
  const int64_t capacity = present(rows) ? rows.shape[0] : data.shape[0];
  if (check.values()) {
    const int64_t m = check_cu_seqlens_values(side.c_str(), cu_seqlens, capacity, max_seqlen);
    if (present(rows)) {
      check_rows_values(rows, m, data.shape[0], false, true, rows_name.c_str());
      check_rows_ascend(rows_name.c_str(), rows, cu_seqlens);
    }
  }
  return capacity;
}

struct Capacities {
  int64_t queries, keys;
};

// The places of one side's packed rows; `side` as above.
void check_places(const Checker& check, const char* name, const lemo_tensor& places, const lemo_tensor& cu_seqlens,
                  Dim capacity) {
  check.typed(name, places, LEMO_I32, {capacity});
  if (check.values()) check_places_values(name, places, cu_seqlens);
}

// The options of a model's attention, of either pass.
template <class Args>
void check_options(const Checker& check, const Args& a, const Capacities& capacities) {
  check_softcap(a.softcap);
  check_window(a.window);
  if (present(a.sinks)) check.typed("sinks", a.sinks, LEMO_F32, {{"Hq", a.q.shape[1]}});
  const bool own_keys = present(a.cu_seqlens_k);
  if (!present(a.places)) {
    if (present(a.places_k)) invalid("places_k: expected places with it, got no tensor for places");
    if (own_keys && a.window > 0) {
      invalid(
          "places: expected the places of the query rows, and places_k, with window and cu_seqlens_k (the storage rows "
          "of q and of k need not be places in one sequence), got no tensor");
    }
    return;
  }
  check_range("window", a.window > 0, "at least 1 with places", static_cast<double>(a.window));
  check_places(check, "places", a.places, a.cu_seqlens, {"capacity", capacities.queries});
  if (own_keys) {
    check_places(check, "places_k", a.places_k, a.cu_seqlens_k, {"capacity_k", capacities.keys});
  } else if (present(a.places_k)) {
    invalid("places_k: expected cu_seqlens_k with it, got no tensor for cu_seqlens_k");
  }
}

// What forward and backward share.
template <class Args>
Capacities check_attention(const Checker& check, const Args& a) {
  check.data("q", a.q, {{"R", kAny}, {"Hq", kAny}, {"D", kAny}});
  check_rows_fit("q", a.q.shape[0]);
  const int64_t d = a.q.shape[2];
  check_range("q", d >= 1, "a head dimension of at least 1", static_cast<double>(d));
  const bool own_keys = present(a.cu_seqlens_k);
  check.like("k", a.k, "q", a.q, {own_keys ? Dim{"Rk", kAny} : Dim{"R", a.q.shape[0]}, {"Hk", kAny}, {"D", d}});
  check_rows_fit("k", a.k.shape[0]);
  check.like("v", a.v, "q", a.q, {{own_keys ? "Rk" : "R", a.k.shape[0]}, {"Hk", a.k.shape[1]}, {"D", d}});
  check_heads(a.q.shape[1], a.k.shape[1]);
  check_scale(a.scale);
  const int64_t queries = check_packed_rows(check, "", a.q, a.cu_seqlens, {"D + 1", kAny}, a.rows, a.max_seqlen);
  if (present(a.tile_offsets) && a.window > 0) {
    throw Error(LEMO_UNSUPPORTED,
                "tile_offsets: expected no tile lists with window: a query sees its whole window, got both; leave out "
                "one of them");
  }
  if (!own_keys) {
    if (present(a.rows_k)) invalid("rows_k: expected cu_seqlens_k with it, got no tensor for cu_seqlens_k");
    check_range("max_seqlen_k", a.max_seqlen_k == 0, "0 without cu_seqlens_k", static_cast<double>(a.max_seqlen_k));
    check_options(check, a, {queries, queries});
    return {queries, queries};
  }
  if (present(a.tile_offsets)) {
    throw Error(LEMO_UNSUPPORTED,
                "tile_offsets: expected no tile lists with cu_seqlens_k: tiles are numbered by rows that queries and "
                "keys share, got both; leave out one of them");
  }
  const Dim documents = {"D + 1", a.cu_seqlens.shape[0]};
  const int64_t keys = check_packed_rows(check, "_k", a.k, a.cu_seqlens_k, documents, a.rows_k, a.max_seqlen_k);
  check_options(check, a, {queries, keys});
  return {queries, keys};
}

// The block slots of queries and keys, with key_weights.
void check_key_weights(const Checker& check, const lemo_attention_backward_args& a, const Capacities& capacities) {
  if (!present(a.key_weights)) {
    if (present(a.row_slots_k)) invalid("row_slots_k: expected key_weights with it, got no tensor for key_weights");
    if (present(a.row_slots)) invalid("row_slots: expected key_weights with it, got no tensor for key_weights");
    return;
  }
  const bool own_keys = present(a.cu_seqlens_k);
  check.typed("key_weights", a.key_weights, LEMO_F32, {{"K", kAny}});
  check_list_fits("key_weights", a.key_weights);
  check.typed("row_slots", a.row_slots, LEMO_I32, {{"capacity", capacities.queries}});
  if (own_keys) {
    check.typed("row_slots_k", a.row_slots_k, LEMO_I32, {{"capacity_k", capacities.keys}});
  } else if (present(a.row_slots_k)) {
    invalid("row_slots_k: expected cu_seqlens_k with it, got no tensor for cu_seqlens_k");
  }
  if (!check.values()) return;
  const auto count = [](const lemo_tensor& cu_seqlens) {
    return static_cast<const int32_t*>(cu_seqlens.data)[cu_seqlens.shape[0] - 1];
  };
  const int64_t slots = a.key_weights.shape[0];
  check_slots_values("row_slots", a.row_slots, count(a.cu_seqlens), slots, lemo_tensor{});
  if (own_keys) check_slots_values("row_slots_k", a.row_slots_k, count(a.cu_seqlens_k), slots, lemo_tensor{});
}

// `transposed`: query tiles of each key tile.
void check_tile_lists(const Checker& check, const lemo_tensor& offsets, const lemo_tensor& tiles,
                      const lemo_tensor& cu_seqlens, int64_t capacity, bool transposed) {
  if (!present(offsets)) {
    if (present(tiles)) invalid("tiles: expected tile_offsets with it, got no tensor for tile_offsets");
    return;
  }
  const int64_t slots = capacity / LEMO_TILE_ROWS + cu_seqlens.shape[0] - 1;
  check.typed("tile_offsets", offsets, LEMO_I32, {{"S + 1", slots + 1}});
  check.typed("tiles", tiles, LEMO_I32, {{"L", kAny}});
  check_list_fits("tiles", tiles);
  if (check.values()) check_tile_lists_values(offsets, tiles, cu_seqlens, transposed);
}

}  // namespace

void validate(const lemo_exec& exec, const lemo_attention_forward_args& a, Purpose purpose) {
  const Checker check(exec, purpose);
  const int64_t capacity = check_attention(check, a).queries;
  const Dim r = {"R", a.q.shape[0]};
  const Dim hq = {"Hq", a.q.shape[1]};
  check.like("out", a.out, "q", a.q, {r, hq, {"D", a.q.shape[2]}}, Role::kOutput);
  check.typed("lse", a.lse, LEMO_F32, {hq, {"capacity", capacity}}, Role::kOutput);
  check_tile_lists(check, a.tile_offsets, a.tiles, a.cu_seqlens, capacity, false);
}

void validate(const lemo_exec& exec, const lemo_attention_backward_args& a, Purpose purpose) {
  const Checker check(exec, purpose);
  const Capacities capacities = check_attention(check, a);
  const Dim r = {"R", a.q.shape[0]};
  const Dim rk = {present(a.cu_seqlens_k) ? "Rk" : "R", a.k.shape[0]};
  const Dim hq = {"Hq", a.q.shape[1]};
  const Dim hk = {"Hk", a.k.shape[1]};
  const Dim d = {"D", a.q.shape[2]};
  check.like("dout", a.dout, "q", a.q, {r, hq, d});
  check.like("out", a.out, "q", a.q, {r, hq, d});
  check.typed("lse", a.lse, LEMO_F32, {hq, {"capacity", capacities.queries}});
  check_key_weights(check, a, capacities);
  check.like("dq", a.dq, "q", a.q, {r, hq, d}, Role::kOutput);
  check.like("dk", a.dk, "q", a.q, {rk, hk, d}, Role::kOutput);
  check.like("dv", a.dv, "q", a.q, {rk, hk, d}, Role::kOutput);
  if (present(a.dsinks)) {
    if (!present(a.sinks)) invalid("dsinks: expected sinks with it, got no tensor for sinks");
    check.typed("dsinks", a.dsinks, LEMO_F32, {{"Hq", a.q.shape[1]}}, Role::kOutput);
  }
  check_tile_lists(check, a.tile_offsets, a.tiles, a.cu_seqlens, capacities.queries, true);
}

namespace {

// A strip of `count` slots out of S.
void check_strip(int64_t first_slot, int64_t count, int64_t slots) {
  check_range("first_slot", first_slot >= 0, "at least 0", static_cast<double>(first_slot));
  if (count <= slots && first_slot <= slots - count) return;
  invalid("first_slot: expected first_slot + C <= S, got " + std::to_string(first_slot) + " + " +
          std::to_string(count) + " with S = " + std::to_string(slots));
}

// A choice of tiles [S, B], and the documents whose tiles have the slots.
void check_chosen(const Checker& check, const lemo_tensor& chosen, const lemo_tensor& cu_seqlens, Role role) {
  check.typed("chosen", chosen, LEMO_I32, {{"S", kAny}, {"B", kAny}}, role);
  check_list_fits("chosen", chosen);
  check.typed("cu_seqlens", cu_seqlens, LEMO_I32, {{"D + 1", kAny}});
  check_range("cu_seqlens", cu_seqlens.shape[0] >= 2, "at least one document, so 2 entries or more",
              static_cast<double>(cu_seqlens.shape[0]));
  check_list_fits("cu_seqlens", cu_seqlens);
  const int64_t documents = cu_seqlens.shape[0] - 1;
  if (chosen.shape[0] < documents) {
    invalid("chosen: expected S >= D = " + std::to_string(documents) + " slots, got " + describe(chosen));
  }
  if (check.values()) check_tile_slots_values(cu_seqlens, chosen.shape[0]);
}

}  // namespace

void validate(const lemo_exec& exec, const lemo_tile_scores_args& a, Purpose purpose) {
  const Checker check(exec, purpose);
  check.data("q", a.q, {{"R", kAny}, {"Hq", kAny}, {"D", kAny}});
  check_rows_fit("q", a.q.shape[0]);
  check_range("q", a.q.shape[2] >= 1, "a head dimension of at least 1", static_cast<double>(a.q.shape[2]));
  check.like("k", a.k, "q", a.q, {{"R", a.q.shape[0]}, {"Hk", kAny}, {"D", a.q.shape[2]}});
  check_heads(a.q.shape[1], a.k.shape[1]);
  check_range("scale", std::isfinite(a.scale) && a.scale >= 0, "a finite number of at least 0", a.scale);
  check_range("probes", a.probes >= 1 && a.probes <= LEMO_TILE_ROWS, "1 to LEMO_TILE_ROWS (128)", a.probes);
  const int64_t capacity = check_packed_rows(check, "", a.q, a.cu_seqlens, {"D + 1", kAny}, a.rows, a.max_seqlen);
  check.typed("scores", a.scores, LEMO_F32, {{"C", kAny}, {"W", kAny}}, Role::kOutput);
  const int64_t tiles = a.max_seqlen / LEMO_TILE_ROWS + (a.max_seqlen % LEMO_TILE_ROWS != 0 ? 1 : 0);
  if (a.scores.shape[1] < tiles) {
    invalid("scores: expected W >= " + std::to_string(tiles) +
            ", the tiles of max_seqlen = " + std::to_string(a.max_seqlen) + " rows, got " + describe(a.scores));
  }
  if (present(a.peaks)) {
    check.typed("peaks", a.peaks, LEMO_F32, {{"C", a.scores.shape[0]}, {"W", a.scores.shape[1]}}, Role::kOutput);
  }
  check_strip(a.first_slot, a.scores.shape[0], capacity / LEMO_TILE_ROWS + a.cu_seqlens.shape[0] - 1);
}

void validate(const lemo_exec& exec, const lemo_select_tiles_args& a, Purpose purpose) {
  const Checker check(exec, purpose);
  check.typed("scores", a.scores, LEMO_F32, {{"C", kAny}, {"W", kAny}});
  if (present(a.masses)) {
    check.typed("masses", a.masses, LEMO_F32, {{"C", a.scores.shape[0]}, {"W", a.scores.shape[1]}});
  }
  check_chosen(check, a.chosen, a.cu_seqlens, Role::kOutput);
  check_strip(a.first_slot, a.scores.shape[0], a.chosen.shape[0]);
  const int64_t width = a.scores.shape[1], words = width / 32 + (width % 32 != 0 ? 1 : 0);
  if (a.chosen.shape[1] < words) {
    invalid("chosen: expected B >= " + std::to_string(words) + ", a bit for each of the W = " + std::to_string(width) +
            " tiles, got " + describe(a.chosen));
  }
  check_range("keys", a.keys >= 1, "at least 1", static_cast<double>(a.keys));
  check_range("density", a.density > 0 && a.density <= 1, "a fraction in (0, 1]", a.density);
  check_range("mass", a.mass > 0, "a number above 0 (1 or more: no limit)", a.mass);
  check_range("first", a.first >= 0, "at least 0", a.first);
  check_range("local", a.local >= 0, "at least 0", a.local);
  if (present(a.covered)) check.typed("covered", a.covered, LEMO_F32, {{"C", a.scores.shape[0]}}, Role::kOutput);
  if (check.values()) {
    check_tile_width_values("scores", a.cu_seqlens, a.first_slot, a.first_slot + a.scores.shape[0], width, "W");
  }
}

void validate(const lemo_exec& exec, const lemo_list_tiles_args& a, Purpose purpose) {
  const Checker check(exec, purpose);
  check_chosen(check, a.chosen, a.cu_seqlens, Role::kInput);
  const Dim ends = {"S + 1", a.chosen.shape[0] + 1};
  check.typed("tile_offsets", a.tile_offsets, LEMO_I32, {ends}, Role::kOutput);
  check.typed("tiles", a.tiles, LEMO_I32, {{"L", kAny}}, Role::kOutput);
  check_list_fits("tiles", a.tiles);
  check.typed("transposed_offsets", a.transposed_offsets, LEMO_I32, {ends}, Role::kOutput);
  check.typed("transposed_tiles", a.transposed_tiles, LEMO_I32, {{"L", a.tiles.shape[0]}}, Role::kOutput);
  if (!check.values()) return;
  check_tile_width_values("chosen", a.cu_seqlens, 0, a.chosen.shape[0], 32 * a.chosen.shape[1], "32 B");
  check_chosen_values(a.chosen, a.cu_seqlens, a.tiles.shape[0]);
}

void validate(const lemo_exec& exec, const lemo_linear_cross_entropy_args& a, Purpose purpose) {
  const Checker check(exec, purpose);
  check.data("hidden", a.hidden, {{"N", kAny}, {"d", kAny}});
  check.width("hidden", a.hidden);
  check_rows_fit("hidden", a.hidden.shape[0]);
  const Dim n = {"N", a.hidden.shape[0]};
  const Dim d = {"d", a.hidden.shape[1]};
  check.like("weight", a.weight, "hidden", a.hidden, {{"V", kAny}, d});
  const Dim v = {"V", a.weight.shape[0]};
  check_range("weight", v.size >= 1, "at least one class", static_cast<double>(v.size));
  if (present(a.bias)) check.like("bias", a.bias, "hidden", a.hidden, {v});
  if (present(a.lora_a)) {
    check.like("lora_a", a.lora_a, "hidden", a.hidden, {{"r", kAny}, d});
    check.like("lora_b", a.lora_b, "hidden", a.hidden, {v, {"r", a.lora_a.shape[0]}});
    check_range("lora_scale", std::isfinite(a.lora_scale), "a finite number", a.lora_scale);
  } else if (present(a.lora_b)) {
    invalid("lora_b: expected lora_a with it, got no tensor for lora_a");
  }
  check.typed("targets", a.targets, LEMO_I64, {n});
  check_softcap(a.softcap);
  check_range("reduction", a.reduction == LEMO_REDUCE_MEAN || a.reduction == LEMO_REDUCE_SUM,
              "LEMO_REDUCE_MEAN (0) or LEMO_REDUCE_SUM (1)", a.reduction);
  check_range("segment_rows", a.segment_rows >= 0, "at least 0 (0 = chosen)", a.segment_rows);
  check.typed("loss", a.loss, LEMO_F32, {{"1", 1}}, Role::kOutput);
  check.typed("valid", a.valid, LEMO_I64, {{"1", 1}}, Role::kOutput);
  if (present(a.dhidden)) check.like("dhidden", a.dhidden, "hidden", a.hidden, {n, d}, Role::kOutput);
  if (present(a.dweight)) check.typed("dweight", a.dweight, LEMO_F32, {v, d}, Role::kOutput);
  if (present(a.dbias)) check.typed("dbias", a.dbias, LEMO_F32, {v}, Role::kOutput);
  if ((present(a.dlora_a) || present(a.dlora_b)) && !present(a.lora_a)) {
    invalid("dlora_a, dlora_b: expected lora_a and lora_b with them, got no tensor for lora_a");
  }
  if (present(a.dlora_a)) check.typed("dlora_a", a.dlora_a, LEMO_F32, {{"r", a.lora_a.shape[0]}, d}, Role::kOutput);
  if (present(a.dlora_b)) check.typed("dlora_b", a.dlora_b, LEMO_F32, {v, {"r", a.lora_a.shape[0]}}, Role::kOutput);
  if (check.values()) check_targets_values(a.targets, a.ignore_index, v.size);
}

}  // namespace lemo
