/** @file
 * The list of operations and of the fields of their arguments, for code that treats all of them alike: the library's
 * own table, entry points and Python module, lemo.hpp, and bindings for other languages. Macros only.
 *
 * LEMO_OPERATIONS(PLAIN, WITH_WORKSPACE) expands PLAIN(op) or WITH_WORKSPACE(op) for every operation: lemo_<op>() takes
 * a lemo_<op>_args; WITH_WORKSPACE: and may need as much workspace as lemo_<op>_workspace() returns.
 *
 * LEMO_FIELDS_<op>(F) expands F(role, field) for every field of lemo_<op>_args after `struct_size`, in order:
 *   input             a tensor that must be given
 *   optional          a tensor that may be absent
 *   companion         a tensor that goes with optional ones that the header names: given if they are, and only then
 *   output            a tensor that is written, and must be given
 *   optional_output   a tensor that is written if it is given
 *   inout             a tensor that is read and written, and must be given
 *   value             a number: a size, a factor, an enumerator, or a flag (0 or 1)
 *   layout            a lemo_blocks
 *   reserved          0 */
#ifndef LEMO_OPERATIONS_H
#define LEMO_OPERATIONS_H

/* clang-format off */
#define LEMO_OPERATIONS(PLAIN, WITH_WORKSPACE) \
  PLAIN(gather)                                \
  PLAIN(scatter_add)                           \
  PLAIN(gather_norm)                           \
  WITH_WORKSPACE(gather_norm_backward)         \
  PLAIN(rotary)                                \
  PLAIN(swiglu)                                \
  PLAIN(swiglu_backward)                       \
  PLAIN(relu)                                  \
  PLAIN(relu_backward)                         \
  WITH_WORKSPACE(select)                       \
  WITH_WORKSPACE(scores)                       \
  WITH_WORKSPACE(predict)                      \
  WITH_WORKSPACE(attention_forward)            \
  WITH_WORKSPACE(attention_backward)           \
  WITH_WORKSPACE(tile_scores)                  \
  PLAIN(select_tiles)                          \
  PLAIN(list_tiles)                            \
  WITH_WORKSPACE(linear_cross_entropy)

#define LEMO_FIELDS_gather(F) \
  F(input, x) F(optional, rows) F(optional, weights) F(companion, slots) F(output, out)

#define LEMO_FIELDS_scatter_add(F) \
  F(inout, x) F(optional, rows) F(input, y) F(optional, base)

#define LEMO_FIELDS_gather_norm(F)                                                                       \
  F(input, x) F(optional, rows) F(optional, residual) F(optional, weight) F(optional, bias)              \
  F(value, norm) F(value, eps) F(output, y) F(optional_output, packed)

#define LEMO_FIELDS_gather_norm_backward(F)                                                              \
  F(input, dy) F(input, s) F(optional, weight) F(optional, ds_extra) F(optional, rows) F(value, norm)    \
  F(value, eps) F(value, accumulate) F(reserved, reserved) F(inout, dx) F(optional_output, dweight)      \
  F(optional_output, dbias)

#define LEMO_FIELDS_rotary(F)                                                                            \
  F(input, x) F(input, cos) F(input, sin) F(optional, rows) F(value, inverse) F(reserved, reserved)      \
  F(output, out)

#define LEMO_FIELDS_swiglu(F) \
  F(input, gate) F(input, up) F(output, out)

#define LEMO_FIELDS_swiglu_backward(F) \
  F(input, dout) F(input, gate) F(input, up) F(output, dgate) F(output, dup)

#define LEMO_FIELDS_relu(F) \
  F(input, x) F(output, out) F(output, bits)

#define LEMO_FIELDS_relu_backward(F) \
  F(input, dout) F(input, bits) F(output, dx)

#define LEMO_FIELDS_select(F)                                                                            \
  F(input, scores) F(layout, blocks) F(value, mode) F(value, keep) F(value, threshold)                   \
  F(value, always_first) F(value, always_last) F(reserved, reserved) F(value, seed) F(output, kept)      \
  F(output, slots) F(output, row_offsets) F(output, cu_seqlens) F(output, rows) F(output, row_slots)     \
  F(output, weights) F(output, info)

#define LEMO_FIELDS_scores(F)                                                                            \
  F(input, q) F(input, k) F(layout, blocks) F(value, scale) F(value, normalize) F(output, scores)        \
  F(optional_output, map) F(value, window) F(value, softcap) F(reserved, reserved)

#define LEMO_FIELDS_predict(F)                                                                           \
  F(input, x) F(input, wq1) F(input, wq2) F(input, wq3) F(input, wk1) F(input, wk2) F(input, wk3)        \
  F(layout, blocks) F(value, norm) F(value, pool) F(value, eps) F(value, normalize) F(output, scores)    \
  F(optional_output, queries) F(optional_output, keys)

#define LEMO_FIELDS_attention_forward(F)                                                                 \
  F(input, q) F(input, k) F(input, v) F(input, cu_seqlens) F(optional, rows) F(value, max_seqlen)        \
  F(value, scale) F(value, softcap) F(output, out) F(output, lse) F(optional, tile_offsets)              \
  F(companion, tiles) F(optional, cu_seqlens_k) F(optional, rows_k) F(value, max_seqlen_k)               \
  F(value, window) F(optional, places) F(companion, places_k) F(optional, sinks)

#define LEMO_FIELDS_attention_backward(F)                                                                \
  F(input, dout) F(input, q) F(input, k) F(input, v) F(input, out) F(input, lse) F(input, cu_seqlens)    \
  F(optional, rows) F(optional, key_weights) F(companion, row_slots) F(value, max_seqlen)                \
  F(value, scale) F(value, softcap) F(output, dq) F(output, dk) F(output, dv)                            \
  F(optional, tile_offsets) F(companion, tiles) F(optional, cu_seqlens_k) F(optional, rows_k)            \
  F(companion, row_slots_k) F(value, max_seqlen_k) F(value, window) F(optional, places)                  \
  F(companion, places_k) F(optional, sinks) F(optional_output, dsinks)

#define LEMO_FIELDS_tile_scores(F)                                                                       \
  F(input, q) F(input, k) F(input, cu_seqlens) F(optional, rows) F(value, max_seqlen)                    \
  F(value, first_slot) F(value, scale) F(value, probes) F(output, scores) F(optional_output, peaks)

#define LEMO_FIELDS_select_tiles(F)                                                                      \
  F(input, scores) F(input, cu_seqlens) F(value, first_slot) F(value, keys) F(value, density)            \
  F(value, mass) F(value, first) F(value, local) F(output, chosen) F(optional_output, covered)           \
  F(optional, masses)

#define LEMO_FIELDS_list_tiles(F)                                                                        \
  F(input, chosen) F(input, cu_seqlens) F(output, tile_offsets) F(output, tiles)                         \
  F(output, transposed_offsets) F(output, transposed_tiles)

#define LEMO_FIELDS_linear_cross_entropy(F)                                                              \
  F(input, hidden) F(input, weight) F(optional, bias) F(optional, lora_a) F(companion, lora_b)           \
  F(input, targets) F(value, ignore_index) F(value, lora_scale) F(value, softcap) F(value, reduction)    \
  F(value, segment_rows) F(output, loss) F(output, valid) F(optional_output, dhidden)                    \
  F(optional_output, dweight) F(optional_output, dbias) F(optional_output, dlora_a)                      \
  F(optional_output, dlora_b)
/* clang-format on */

#endif
