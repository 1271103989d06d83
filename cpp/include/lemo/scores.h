/* Exact informativeness of token blocks from queries and keys (paper eq. 2 and section 4.2): the predictors' teacher.
 *
 *   S_ij   = (1/Hq) sum_h max(scale * q_i^h . k_j^h, 0)      for j <= i in the same document, else 0
 *   I(m,n) = max of S_ij over i in block m, j in block n
 *   I(n)   = sum over m >= n of I(m, n), m in n's document    (normalize: divided by the number of such m)
 *
 * Memory is linear in T unless the block map is asked for. */
#ifndef LEMO_SCORES_H
#define LEMO_SCORES_H

#include "lemo/types.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct lemo_scores_args {
  uint64_t struct_size;
  lemo_tensor q; /* [T, Hq, D] f32 (CPU), f16/bf16 (CUDA), position embedding applied; rows and heads may be strided */
  lemo_tensor k; /* [T, Hk, D], Hk divides Hq; query head h reads key head h / (Hq / Hk) */
  lemo_blocks blocks;
  float scale; /* usually 1 / sqrt(D) */
  int32_t normalize;

  lemo_tensor scores; /* out: float32 [num_blocks] */
  lemo_tensor map;    /* optional out: float32 [num_blocks, num_blocks], map[m, n] = I(m, n), 0 where n > m or the
                         documents differ */
} lemo_scores_args;

LEMO_API lemo_status lemo_scores(const lemo_exec* exec, const lemo_scores_args* args);
LEMO_API lemo_status lemo_scores_workspace(const lemo_exec* exec, const lemo_scores_args* args, uint64_t* bytes);

#ifdef __cplusplus
}
#endif
#endif
