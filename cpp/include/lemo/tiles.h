/** @file
 * The choice of tiles for two-dimensional sparsity: how much attention the keys of a tile hold, which tiles a query
 * tile attends to, and the lists that attention reads (attention.h, whose tiles, slots and rows these are).
 *
 * A query tile's softmax is looked at in a few of its rows ("probes"), all keys before them included:
 *
 *   mass(m, n) = mean over heads h and probes i of sum_j exp(scale * q_i^h . k_j^h - lse_i^h), j <= i in tile n
 *   lse_i^h    = log sum_j exp(scale * q_i^h . k_j^h), all j <= i of the document
 *   peak(m, n) = maximum over heads h of the mean over probes i of the same sums
 *
 * so that the masses of a query tile add up to 1. Masses say what a choice holds; peaks rank tiles better, because
 * attention that only one head needs counts in full. Probe r of P in a query tile of N rows is its row
 * (2 r + 1) N / (2 P), rounded down; with N < P, rows are repeated. With P = LEMO_TILE_ROWS the mass of a whole tile is
 * exact. It is that of attention without soft-cap, window and sinks: in layers that have these, a guess to rank tiles
 * by (with sinks, shares of what they leave to keys).
 *
 * No operation needs memory quadratic in the number of tiles except `chosen`, of one bit per pair: scores are made and
 * read for a strip of query tiles at a time. Nothing is synchronized. */
#ifndef LEMO_TILES_H
#define LEMO_TILES_H

#include "lemo/attention.h"
#include "lemo/types.h"

#ifdef __cplusplus
extern "C" {
#endif

/** Attention mass of key tiles, for the query tiles with slots first_slot to first_slot + C - 1 of the S slots, where
 * S = capacity / LEMO_TILE_ROWS + D. */
typedef struct lemo_tile_scores_args {
  uint64_t struct_size;
  lemo_tensor q;          /**< float [R, Hq, D]; rows and heads may be strided */
  lemo_tensor k;          /**< float [R, Hk, D], Hk divides Hq; rows and heads may be strided */
  lemo_tensor cu_seqlens; /**< int32 [D + 1]: first packed row of every document, from 0, ascending, M at the end */
  lemo_tensor rows;       /**< optional: int32 [capacity], storage row of every packed row; not read from M on */
  int64_t max_seqlen;     /**< at least the packed rows of the longest document */
  int64_t first_slot;     /**< at least 0; first_slot + C is at most S */
  float scale;            /**< finite, at least 0; usually 1 / sqrt(D) */
  int32_t probes;         /**< rows of a query tile that are looked at, 1 to LEMO_TILE_ROWS */

  lemo_tensor scores; /**< out: float32 [C, W], W at least the tiles of max_seqlen rows: mass(m, n) at [slot of m -
                           first_slot, n]; 0 if n > m, and in slots without a tile */
  lemo_tensor peaks;  /**< optional out: float32 [C, W], peak(m, n) in the same places */
} lemo_tile_scores_args;
LEMO_API lemo_status lemo_tile_scores(const lemo_exec* exec, const lemo_tile_scores_args* args);
LEMO_API lemo_status lemo_tile_scores_workspace(const lemo_exec* exec, const lemo_tile_scores_args* args,
                                                uint64_t* bytes);

/** Chooses key tiles for a strip of query tiles by any scores.
 *
 * Query tile m of a document always attends to itself, the first `first` tiles and the `local` tiles before it. Then
 * tiles follow in descending order of their scores (ties: the nearest first) until one of the limits is reached:
 *
 *   count >= min(ceil(keys / LEMO_TILE_ROWS), floor(density * (m + 1) + 0.5))     or     sum of masses >= mass
 *
 * where count and sum include the tiles that are always there, the query tile itself among them. Masses are those of
 * `masses`, or the scores themselves if it is absent. The sum is that of each mass cut to [0, 1] and rounded down to a
 * multiple of 2^-40, so that its order does not matter and every backend stops at the same tile; with mass >= 1 it sets
 * no limit. A score of NaN ranks as -infinity does, and a mass of NaN counts as 0. */
typedef struct lemo_select_tiles_args {
  uint64_t struct_size;
  lemo_tensor scores;     /**< float32 [C, W], W at least the tiles of a document with a slot among these; higher is
                               chosen first; entries above m are not read. Rows may be strided */
  lemo_tensor cu_seqlens; /**< int32 [D + 1] */
  int64_t first_slot;     /**< the slot of row 0 of `scores`; first_slot + C is at most S */
  int64_t keys;           /**< at least 1: key rows per query tile */
  float density;          /**< share of the tiles that a query tile could see, in (0, 1] */
  float mass;             /**< above 0 */
  int32_t first;          /**< at least 0 */
  int32_t local;          /**< at least 0 */

  lemo_tensor chosen;  /**< out: int32 [S, B], 32 B at least W. Of rows first_slot to first_slot + C - 1: bit n % 32 of
                            chosen[s, n / 32] is set if the query tile of slot s attends to tile n below its own; rows of
                            slots without a tile become 0. Other rows are not touched */
  lemo_tensor covered; /**< optional out: float32 [C], the sum above when the choice is complete; 0 in slots without a
                            tile */
  lemo_tensor masses;  /**< optional: float32 [C, W], what the tiles hold if `scores` only ranks them; entries above m
                            are not read. Rows may be strided */
} lemo_select_tiles_args;
LEMO_API lemo_status lemo_select_tiles(const lemo_exec* exec, const lemo_select_tiles_args* args);

/** Turns the choice into lists, as the forward pass of attention reads them and, transposed, as the backward pass does.
 *
 * L must be at least the number of bits that are set, and the rows of slots without a tile must be 0. On CUDA, where
 * neither is checked, nothing is written outside of the outputs: lists end at entry L. */
typedef struct lemo_list_tiles_args {
  uint64_t struct_size;
  lemo_tensor chosen;     /**< int32 [S, B], see lemo_select_tiles_args; 32 B at least the tiles of every document */
  lemo_tensor cu_seqlens; /**< int32 [D + 1] */

  lemo_tensor tile_offsets;       /**< out: int32 [S + 1] */
  lemo_tensor tiles;              /**< out: int32 [L], key tiles of every query tile, ascending, then 0 */
  lemo_tensor transposed_offsets; /**< out: int32 [S + 1] */
  lemo_tensor transposed_tiles;   /**< out: int32 [L], query tiles of every key tile, ascending, then 0 */
} lemo_list_tiles_args;
LEMO_API lemo_status lemo_list_tiles(const lemo_exec* exec, const lemo_list_tiles_args* args);

#ifdef __cplusplus
}
#endif
#endif
