// The tensors and the reserved fields of every argument struct: what can be done to all of them alike.
#pragma once

#include <type_traits>

#include "lemo/lemo.h"

namespace lemo {

// Calls visit(name, tensor) for every tensor of the struct, in header order. Args may be const.
#define LEMO_FIELD(field) visit(#field, a.field);
#define LEMO_BLOCKS                   \
  visit("offsets", a.blocks.offsets); \
  visit("documents", a.blocks.documents);
// clang-format off
template <class Args, class Visit>
void for_each_tensor(Args& a, Visit&& visit) {
  using Struct = std::remove_const_t<Args>;
  if constexpr (std::is_same_v<Struct, lemo_gather_args>) {
    LEMO_FIELD(x) LEMO_FIELD(rows) LEMO_FIELD(weights) LEMO_FIELD(slots) LEMO_FIELD(out)
  } else if constexpr (std::is_same_v<Struct, lemo_scatter_add_args>) {
    LEMO_FIELD(x) LEMO_FIELD(rows) LEMO_FIELD(y) LEMO_FIELD(base)
  } else if constexpr (std::is_same_v<Struct, lemo_gather_norm_args>) {
    LEMO_FIELD(x) LEMO_FIELD(rows) LEMO_FIELD(residual) LEMO_FIELD(weight) LEMO_FIELD(bias) LEMO_FIELD(y)
    LEMO_FIELD(packed) LEMO_FIELD(mean) LEMO_FIELD(rstd)
  } else if constexpr (std::is_same_v<Struct, lemo_gather_norm_backward_args>) {
    LEMO_FIELD(dy) LEMO_FIELD(s) LEMO_FIELD(weight) LEMO_FIELD(ds_extra) LEMO_FIELD(rows) LEMO_FIELD(dx)
    LEMO_FIELD(dweight) LEMO_FIELD(dbias)
  } else if constexpr (std::is_same_v<Struct, lemo_select_args>) {
    LEMO_FIELD(scores) LEMO_BLOCKS LEMO_FIELD(kept) LEMO_FIELD(slots) LEMO_FIELD(row_offsets) LEMO_FIELD(cu_seqlens)
    LEMO_FIELD(rows) LEMO_FIELD(row_slots) LEMO_FIELD(weights) LEMO_FIELD(info)
  } else if constexpr (std::is_same_v<Struct, lemo_scores_args>) {
    LEMO_FIELD(q) LEMO_FIELD(k) LEMO_BLOCKS LEMO_FIELD(scores) LEMO_FIELD(map)
  } else if constexpr (std::is_same_v<Struct, lemo_predict_args>) {
    LEMO_FIELD(x) LEMO_FIELD(wq1) LEMO_FIELD(wq2) LEMO_FIELD(wq3) LEMO_FIELD(wk1) LEMO_FIELD(wk2) LEMO_FIELD(wk3)
    LEMO_BLOCKS LEMO_FIELD(scores) LEMO_FIELD(queries) LEMO_FIELD(keys)
  } else if constexpr (std::is_same_v<Struct, lemo_attention_forward_args>) {
    LEMO_FIELD(q) LEMO_FIELD(k) LEMO_FIELD(v) LEMO_FIELD(cu_seqlens) LEMO_FIELD(rows) LEMO_FIELD(out) LEMO_FIELD(lse)
    LEMO_FIELD(tile_offsets) LEMO_FIELD(tiles) LEMO_FIELD(cu_seqlens_k) LEMO_FIELD(rows_k)
  } else if constexpr (std::is_same_v<Struct, lemo_attention_backward_args>) {
    LEMO_FIELD(dout) LEMO_FIELD(q) LEMO_FIELD(k) LEMO_FIELD(v) LEMO_FIELD(out) LEMO_FIELD(lse) LEMO_FIELD(cu_seqlens)
    LEMO_FIELD(rows) LEMO_FIELD(key_weights) LEMO_FIELD(row_slots) LEMO_FIELD(dq) LEMO_FIELD(dk) LEMO_FIELD(dv)
    LEMO_FIELD(tile_offsets) LEMO_FIELD(tiles) LEMO_FIELD(cu_seqlens_k) LEMO_FIELD(rows_k) LEMO_FIELD(row_slots_k)
  } else {
    static_assert(std::is_same_v<Struct, lemo_linear_cross_entropy_args>, "an argument struct");
    LEMO_FIELD(hidden) LEMO_FIELD(weight) LEMO_FIELD(bias) LEMO_FIELD(lora_a) LEMO_FIELD(lora_b) LEMO_FIELD(targets)
    LEMO_FIELD(loss) LEMO_FIELD(valid) LEMO_FIELD(dhidden) LEMO_FIELD(dweight) LEMO_FIELD(dbias) LEMO_FIELD(dlora_a)
    LEMO_FIELD(dlora_b)
  }
}
// clang-format on
#undef LEMO_FIELD
#undef LEMO_BLOCKS

// Calls visit(name, value) for every reserved field.
template <class Args, class Visit>
void for_each_reserved(const Args& a, Visit&& visit) {
  if constexpr (std::is_same_v<Args, lemo_select_args> || std::is_same_v<Args, lemo_gather_norm_backward_args> ||
                std::is_same_v<Args, lemo_attention_forward_args> ||
                std::is_same_v<Args, lemo_attention_backward_args>) {
    visit("reserved", a.reserved);
  }
  if constexpr (std::is_same_v<Args, lemo_select_args> || std::is_same_v<Args, lemo_scores_args> ||
                std::is_same_v<Args, lemo_predict_args>) {
    visit("blocks.reserved", a.blocks.reserved);
  }
}

}  // namespace lemo
