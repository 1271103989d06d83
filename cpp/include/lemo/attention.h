/* Causal attention over kept rows, forward and backward.
 *
 * The M packed rows of D documents are given by cu_seqlens. Packed row i of q, k, v, out (and their gradients) lies
 * at storage row rows[i] of each tensor: original offsets, no copy. Absent `rows` = packed storage (storage row i).
 * Within a document they ascend (rows[i] > rows[i - 1]: kernels tell by its ends whether a run of rows is one piece of
 * storage), and packed order decides causality: i sees j iff j <= i in the same document.
 *   out_i = sum_j P_ij v_j,  P_ij = exp(scale * q_i . k_j - lse_i),  lse_i = log sum_j exp(scale * q_i . k_j)
 * Query head h reads key/value head h / (Hq / Hk). D in {64, 80, 96, 128} on CUDA, any on the CPU.
 *
 * Keys may have rows of their own: with cu_seqlens_k, packed row j of k, v, dk and dv lies at storage row rows_k[j]
 * (absent rows_k: storage row j), and the sizes of the two sides are independent. cu_seqlens, rows, max_seqlen, lse and
 * row_slots then describe the queries alone. A document with nq query rows and nk key rows is aligned at its end: its
 * queries are the last nq of nk positions, so that its query i sees its key j (both counted within the document) iff
 *   j <= i + nk - nq
 * A query that sees no key (i < nq - nk) has out = 0 and lse = -infinity, and neither gets nor gives a gradient; a key
 * that no query sees (nq = 0) gets the gradient 0. A document processed in chunks of queries, each over the keys up to
 * its end, therefore gives the results of the whole, with dk and dv summed over the chunks.
 *
 * Two-dimensional sparsity (the paper's extension): with tile lists, a query sees only part of the earlier keys. The
 * rows of each document are cut into tiles of LEMO_TILE_ROWS packed rows; tile i of document d has the slot
 * cu_seqlens[d] / LEMO_TILE_ROWS + d + i, so that S = capacity / LEMO_TILE_ROWS + D slots hold any division into
 * documents (some stay empty). A query tile always sees itself, causally, and besides that the key tiles of its list,
 * whole. lse covers what was seen. */
#ifndef LEMO_ATTENTION_H
#define LEMO_ATTENTION_H

#include "lemo/types.h"

#ifdef __cplusplus
extern "C" {
#endif

#define LEMO_TILE_ROWS 128

typedef struct lemo_attention_forward_args {
  uint64_t struct_size;
  lemo_tensor q;          /* [R, Hq, D] f32 (CPU), f16/bf16 (CUDA); row and head strides multiples of 8 on CUDA */
  lemo_tensor k;          /* [R, Hk, D]; [Rk, Hk, D] with cu_seqlens_k */
  lemo_tensor v;          /* as k */
  lemo_tensor cu_seqlens; /* int32 [D + 1], packed rows; M = cu_seqlens[D] <= capacity */
  lemo_tensor rows;       /* optional int32 [capacity]: storage row of each packed row */
  int64_t max_seqlen;     /* the longest document in packed rows, or an upper bound of it */
  float scale;
  int32_t reserved;

  lemo_tensor out; /* out: [R, Hq, D], dtype of q; rows not named keep what they hold */
  lemo_tensor lse; /* out: float32 [Hq, capacity], by packed row. capacity = len(rows), or R without rows */

  /* optional tile lists: list s is tiles[tile_offsets[s]] .. tiles[tile_offsets[s + 1] - 1], ascending */
  lemo_tensor tile_offsets; /* int32 [S + 1], from 0 */
  lemo_tensor tiles;        /* int32 [L], with tile_offsets: key tiles of a query tile, below its own, by number within
                               the document */

  /* optional rows of the keys; absent and 0: those of the queries. Not together with tile lists. */
  lemo_tensor cu_seqlens_k; /* int32 [D + 1], key rows of the same D documents; cu_seqlens_k[D] <= capacity_k */
  lemo_tensor rows_k;       /* optional int32 [capacity_k], with cu_seqlens_k: storage row of each packed key row.
                               capacity_k = len(rows_k), or Rk without rows_k */
  int64_t max_seqlen_k;     /* with cu_seqlens_k: the longest document in packed key rows, or an upper bound of it */
} lemo_attention_forward_args;

LEMO_API lemo_status lemo_attention_forward(const lemo_exec* exec, const lemo_attention_forward_args* args);
LEMO_API lemo_status lemo_attention_forward_workspace(const lemo_exec* exec, const lemo_attention_forward_args* args,
                                                      uint64_t* bytes);

/* Backward pass restricted to the given rows, with the output and log-sum-exp of whatever forward pass made them:
 * where that pass saw more keys than these, P_ij is still the exact probability.
 *   D_i = dout_i . out_i;  dS_ij = P_ij (dout_i . v_j - D_i)
 *   dq_i = scale sum_j w_ij dS_ij k_j;  dk_j = scale sum_i w_ij dS_ij q_i;  dv_j = sum_i w_ij P_ij dout_i
 * w_ij = key_weights[slot of j], or 1 where i and j share a block slot, or 1 without key_weights. The slot of a query
 * is row_slots[i], that of a key row_slots_k[j] with cu_seqlens_k and row_slots[j] without. */
typedef struct lemo_attention_backward_args {
  uint64_t struct_size;
  lemo_tensor dout; /* [R, Hq, D], dtype of q */
  lemo_tensor q, k, v, out;
  lemo_tensor lse; /* float32 [Hq, capacity] */
  lemo_tensor cu_seqlens;
  lemo_tensor rows;        /* optional, as in the forward pass */
  lemo_tensor key_weights; /* optional float32 [K], by block slot */
  lemo_tensor row_slots;   /* int32 [capacity], with key_weights: block slot of every packed (query) row */
  int64_t max_seqlen;
  float scale;
  int32_t reserved;

  lemo_tensor dq; /* out: [R, Hq, D] */
  lemo_tensor dk; /* out: shape of k */
  lemo_tensor dv; /* out: shape of v */

  lemo_tensor tile_offsets; /* optional int32 [S + 1] and int32 [L]: the transposed lists, query tiles of a key tile, */
  lemo_tensor tiles;        /* above its own, ascending */

  lemo_tensor cu_seqlens_k; /* optional rows of the keys, as in the forward pass */
  lemo_tensor rows_k;
  lemo_tensor
      row_slots_k; /* int32 [capacity_k], with cu_seqlens_k and key_weights: block slot of every packed key row */
  int64_t max_seqlen_k;
} lemo_attention_backward_args;

/* exec->deterministic = 1: sums in a fixed order, bitwise repeatable. */
LEMO_API lemo_status lemo_attention_backward(const lemo_exec* exec, const lemo_attention_backward_args* args);
LEMO_API lemo_status lemo_attention_backward_workspace(const lemo_exec* exec, const lemo_attention_backward_args* args,
                                                       uint64_t* bytes);

#ifdef __cplusplus
}
#endif
#endif
