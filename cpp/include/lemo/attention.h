/** @file
 * Causal attention over kept rows, forward and backward.
 *
 * The M packed rows of D documents are given by `cu_seqlens`. Packed row i of queries, keys, values, outputs (and their
 * gradients) lies at storage row rows[i] of each tensor: original offsets, no copy. Without `rows`, it lies at storage
 * row i. Within a document storage rows ascend (kernels conclude from the ends of a run of rows that it is one piece of
 * storage), and packed order decides causality: i sees j iff j <= i in the same document.
 *
 *   out_i = sum_j P_ij v_j,  P_ij = exp(s_ij - lse_i),  lse_i = log sum_j exp(s_ij),  s_ij = scale * q_i . k_j
 *
 * Query head h reads key and value head h / (Hq / Hk). The size of a head is 64, 80, 96, 128 or 256 on CUDA, any on the
 * CPU.
 *
 * Options that some models' attention has:
 *
 *   softcap c > 0   s_ij is replaced by c tanh(s_ij / c).
 *   window w > 0    i sees j only if place(j) > place(i) - w: w places, its own included. Places count what elimination
 *                   left out: those of queries and of keys number one sequence, and ascend within a document. They are
 *                   `places` (and `places_k` of separate key rows, see below), or else storage rows.
 *   sinks           a logit per query head that every query sees besides its keys, with the value 0: it takes its
 *                   share of the softmax, lse_i = log(exp(sink) + sum_j exp(s_ij)), and adds nothing to out_i.
 *
 * Keys may have separate rows: with `cu_seqlens_k`, packed row j of keys and values (and their gradients) lies at
 * storage row rows_k[j] (without `rows_k`: j), and the sizes of the two sides are independent. `cu_seqlens`, `rows`,
 * `max_seqlen`, `lse` and `row_slots` then describe the queries alone. A document with nq query rows and nk key rows is
 * aligned at its end: its queries are the last nq of nk positions, so that its query i sees its key j (both counted
 * within the document) iff
 *
 *   j <= i + nk - nq
 *
 * A query that sees no key (i < nq - nk, or a window without one) has out = 0 and lse = -infinity (with `sinks`: the
 * sink), and neither gets nor gives a gradient; a key that no query sees gets the gradient 0. A document processed in
 * chunks of queries, each over the keys up to its end, therefore gives the results of the whole, with dk and dv summed
 * over the chunks.
 *
 * Two-dimensional sparsity (the paper's extension): with tile lists, a query sees only part of the earlier keys. The
 * rows of each document are cut into tiles of LEMO_TILE_ROWS packed rows; tile i of document d has the slot
 * cu_seqlens[d] / LEMO_TILE_ROWS + d + i, so that S = capacity / LEMO_TILE_ROWS + D slots hold any division into
 * documents (some stay empty). List s is tiles[tile_offsets[s]] to tiles[tile_offsets[s + 1] - 1], numbers of tiles
 * within the document, ascending. A query tile sees itself, causally, and the whole key tiles of its list. `lse` covers
 * what was seen. Tile lists exclude separate rows of keys, and a window (LEMO_UNSUPPORTED).
 *
 * In the shapes below, capacity is the length of `rows`, or R without it, and at least M; capacity_k likewise for keys.
 * A further limit on CUDA (LEMO_UNSUPPORTED): `scale` is at least 0. */
#ifndef LEMO_ATTENTION_H
#define LEMO_ATTENTION_H

#include "lemo/types.h"

#ifdef __cplusplus
extern "C" {
#endif

/** Packed rows of a tile of the tile lists. */
#define LEMO_TILE_ROWS 128

/** Outputs of the given rows. */
typedef struct lemo_attention_forward_args {
  uint64_t struct_size;
  lemo_tensor q;          /**< float [R, Hq, D]; rows and heads may be strided, here and below */
  lemo_tensor k;          /**< float [R, Hk, D], Hk divides Hq; [Rk, Hk, D] with `cu_seqlens_k` */
  lemo_tensor v;          /**< float, shape of `k` */
  lemo_tensor cu_seqlens; /**< int32 [D + 1]: first packed row of every document, from 0, ascending, M at the end */
  lemo_tensor rows;       /**< optional: int32 [capacity], storage row of every packed row; not read from M on */
  int64_t max_seqlen;     /**< at least the packed rows of the longest document */
  float scale;            /**< finite; usually 1 / sqrt(D) */
  float softcap;          /**< c > 0: scores are c tanh(s / c); 0: as they are */

  lemo_tensor out; /**< out: float [R, Hq, D]; rows that `rows` does not name are not touched */
  lemo_tensor lse; /**< out: float32 [Hq, capacity], by packed row; without meaning from M on */

  lemo_tensor tile_offsets; /**< optional: int32 [S + 1], from 0, ascending */
  lemo_tensor tiles;        /**< with `tile_offsets`: int32 [L], key tiles of every query tile, below its own */

  lemo_tensor cu_seqlens_k; /**< optional: int32 [D + 1], first packed key row of every document, as `cu_seqlens` */
  lemo_tensor rows_k;       /**< optional: int32 [capacity_k], as `rows`; needs `cu_seqlens_k` */
  int64_t max_seqlen_k;     /**< at least the packed key rows of the longest document; 0 without `cu_seqlens_k` */

  int64_t window;       /**< w > 0: places that a query sees, its own included; 0: all before it */
  lemo_tensor places;   /**< optional: int32 [capacity], place of every packed row, at least 0 and ascending within a
                             document; not read from M on. Absent: storage rows, but with `cu_seqlens_k` a window
                             needs them */
  lemo_tensor places_k; /**< with `places` and `cu_seqlens_k`: int32 [capacity_k], likewise */
  lemo_tensor sinks;    /**< optional: float32 [Hq]; -infinity: a head without one */
} lemo_attention_forward_args;
LEMO_API lemo_status lemo_attention_forward(const lemo_exec* exec, const lemo_attention_forward_args* args);
LEMO_API lemo_status lemo_attention_forward_workspace(const lemo_exec* exec, const lemo_attention_forward_args* args,
                                                      uint64_t* bytes);

/** Gradients restricted to the given rows, with the output and log-sum-exp of whatever forward pass made them: if that
 * pass saw more keys than these, P_ij is still the exact probability.
 *
 *   D_i = dout_i . out_i;  dS_ij = P_ij (dout_i . v_j - D_i)
 *   dq_i = scale sum_j w_ij dS_ij k_j;  dk_j = scale sum_i w_ij dS_ij q_i;  dv_j = sum_i w_ij P_ij dout_i
 *   dsinks = -sum_i exp(sink - lse_i) D_i
 *
 * With `softcap` c, dS_ij in dq and dk has the further factor 1 - tanh(s_ij / c)^2. `lse` covers the sinks of the
 * forward pass; here they are read for `dsinks` only.
 *
 * w_ij = key_weights[slot of j], or 1 if i and j share a block slot, or 1 without `key_weights`. The slot of a query is
 * row_slots[i]; that of a key row_slots_k[j] with `cu_seqlens_k`, else row_slots[j].
 *
 * With `deterministic`, sums have a fixed order, and results are bitwise repeatable. On compute capability 9.0 with
 * tile lists, thread blocks then wait for each other in an order that counts on all multiprocessors which the device
 * reports: next to a kernel that never ends, or in a context that gets fewer, the call may not return. */
typedef struct lemo_attention_backward_args {
  uint64_t struct_size;
  lemo_tensor dout;        /**< float [R, Hq, D] */
  lemo_tensor q;           /**< float [R, Hq, D] */
  lemo_tensor k;           /**< float [R, Hk, D]; [Rk, Hk, D] with `cu_seqlens_k` */
  lemo_tensor v;           /**< float, shape of `k` */
  lemo_tensor out;         /**< float [R, Hq, D] */
  lemo_tensor lse;         /**< float32 [Hq, capacity] */
  lemo_tensor cu_seqlens;  /**< int32 [D + 1] */
  lemo_tensor rows;        /**< optional: int32 [capacity] */
  lemo_tensor key_weights; /**< optional: float32 [K], by block slot */
  lemo_tensor row_slots;   /**< with `key_weights`: int32 [capacity], block slot of every packed (query) row */
  int64_t max_seqlen;      /**< as in the forward pass */
  float scale;             /**< as in the forward pass */
  float softcap;           /**< as in the forward pass */

  lemo_tensor dq; /**< out: float [R, Hq, D]; rows that `rows` does not name are not touched */
  lemo_tensor dk; /**< out: float, shape of `k`; rows that are not named are not touched */
  lemo_tensor dv; /**< out: float, shape of `k`; rows that are not named are not touched */

  lemo_tensor tile_offsets; /**< optional: int32 [S + 1], of the lists transposed */
  lemo_tensor tiles;        /**< with `tile_offsets`: int32 [L], query tiles of every key tile, above its own */

  lemo_tensor cu_seqlens_k; /**< optional: int32 [D + 1], as in the forward pass */
  lemo_tensor rows_k;       /**< optional: int32 [capacity_k]; needs `cu_seqlens_k` */
  lemo_tensor row_slots_k;  /**< with `cu_seqlens_k` and `key_weights`: int32 [capacity_k], block slot of every packed
                                 key row */
  int64_t max_seqlen_k;     /**< as in the forward pass */

  int64_t window;       /**< as in the forward pass */
  lemo_tensor places;   /**< optional: int32 [capacity], as in the forward pass */
  lemo_tensor places_k; /**< with `places` and `cu_seqlens_k`: int32 [capacity_k] */
  lemo_tensor sinks;    /**< optional: float32 [Hq], as in the forward pass */
  lemo_tensor dsinks;   /**< optional out: float32 [Hq]; needs `sinks` */
} lemo_attention_backward_args;
LEMO_API lemo_status lemo_attention_backward(const lemo_exec* exec, const lemo_attention_backward_args* args);
LEMO_API lemo_status lemo_attention_backward_workspace(const lemo_exec* exec, const lemo_attention_backward_args* args,
                                                       uint64_t* bytes);

#ifdef __cplusplus
}
#endif
#endif
