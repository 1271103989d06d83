/** @file
 * Exact informativeness of token blocks from queries and keys (paper eq. 2 and section 4.2): what predictors learn
 * from.
 *
 *   S_ij   = (1/Hq) sum over heads h of max(scale * q_i^h . k_j^h, 0)    for j <= i in the same document, else 0
 *   I(m,n) = max of S_ij over i in block m, j in block n
 *   I(n)   = sum over m >= n in the same document of I(m, n)             (normalize: divided by the number of such m)
 *
 * Query head h reads key head h / (Hq / Hk). Memory is linear in T unless `map` is given. On CUDA D is 64, 80, 96 or
 * 128, blocks hold at most 256 tokens, and there is neither `window` nor `softcap`.
 *
 * With `softcap` c > 0, scale * q . k is replaced by c tanh(scale * q . k / c). With `window` w > 0, S_ij is 0 also if
 * j <= i - w, and m counts in the normalization only if it has a query that the window lets see a key of n. Sinks do
 * not enter: S is not a softmax. */
#ifndef LEMO_SCORES_H
#define LEMO_SCORES_H

#include "lemo/types.h"

#ifdef __cplusplus
extern "C" {
#endif

/** Scores of the blocks of one layer from its queries and keys, position embedding applied. */
typedef struct lemo_scores_args {
  uint64_t struct_size;
  lemo_tensor q;      /**< float [T, Hq, D]; rows and heads may be strided */
  lemo_tensor k;      /**< float [T, Hk, D], Hk divides Hq; rows and heads may be strided */
  lemo_blocks blocks; /**< of the T tokens */
  float scale;        /**< finite; usually 1 / sqrt(D) */
  int32_t normalize;  /**< 1: each score is divided by the number of its terms; else 0 */

  lemo_tensor scores; /**< out: float32 [num_blocks], I(n) */
  lemo_tensor map;    /**< optional out: float32 [num_blocks, num_blocks], map[m, n] = I(m, n), and 0 if n > m or the
                           documents differ */

  int64_t window;   /**< w > 0: tokens that a query sees, itself included; 0: all before it */
  float softcap;    /**< c > 0, or 0 for none */
  int32_t reserved; /**< 0 */
} lemo_scores_args;
LEMO_API lemo_status lemo_scores(const lemo_exec* exec, const lemo_scores_args* args);
LEMO_API lemo_status lemo_scores_workspace(const lemo_exec* exec, const lemo_scores_args* args, uint64_t* bytes);

#ifdef __cplusplus
}
#endif
#endif
