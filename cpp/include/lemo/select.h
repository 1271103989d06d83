/* Choosing blocks: scores in, a kept list out. The list stays on the device. (paper 4.2, Algorithm 1) */
#ifndef LEMO_SELECT_H
#define LEMO_SELECT_H

#include "lemo/types.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum lemo_select_mode {
  LEMO_SELECT_THRESHOLD = 0, /* keep block n where score[n] >= threshold */
  LEMO_SELECT_BUDGET = 1,    /* per document, the k highest scores; ties go to the lower block */
  LEMO_SELECT_SAMPLE = 2,    /* per document, k blocks by Pareto sampling; `scores` are target probabilities */
  LEMO_SELECT_POISSON = 3    /* block n with probability score[n], independently of all others */
} lemo_select_mode;

/* What lemo_select writes to `info`. */
typedef enum lemo_select_info {
  LEMO_INFO_KEPT_BLOCKS = 0,      /* K */
  LEMO_INFO_KEPT_ROWS = 1,        /* M */
  LEMO_INFO_LONGEST_DOCUMENT = 2, /* packed rows of the longest document */
  LEMO_INFO_FAULT = 3,            /* 0, or 1 + the first block whose score is not finite (SAMPLE, POISSON: not in (0,
                                     1]), or -1 if nothing is kept (except POISSON); with a fault, K = M = 0 */
  LEMO_INFO_SIZE = 4              /* the number of entries */
} lemo_select_info;

/* k of a document of n blocks = min(n, max(floor(keep * n + 0.5), forced blocks, 1)) (BUDGET, SAMPLE).
 *
 * Forced blocks, kept whatever their score: the first `always_first` and the last `always_last` of each document.
 *
 * Pareto sampling: u_n = hash(seed, n) uniform in (0, 1); the k smallest of (u / (1 - u)) / (p / (1 - p)), in
 * double precision; forced blocks and p >= 0.999 come first. The hash is the one of `lemo_hash_uniform`, so that every
 * backend draws the same blocks. The size of the draw is fixed, at a price: inclusion probabilities equal p only for
 * equal p, and those of pairs are not products. Weights are therefore 1.
 *
 * Poisson sampling: block n is kept where u_n < p_n. Inclusion probabilities are p and those of pairs are products,
 * both exactly, so weights 1/p_m 1/p_n make any sum over pairs of blocks unbiased (Horvitz-Thompson). The number of
 * kept blocks varies around the sum of p and may be 0, which is not a fault. */
typedef struct lemo_select_args {
  uint64_t struct_size;
  lemo_tensor scores; /* float32 [num_blocks]; SAMPLE, POISSON: probabilities in (0, 1] */
  lemo_blocks blocks;
  int32_t mode;    /* lemo_select_mode */
  float keep;      /* BUDGET, SAMPLE: fraction of the blocks, in (0, 1] */
  float threshold; /* THRESHOLD */
  int32_t always_first;
  int32_t always_last;
  int32_t reserved;
  uint64_t seed; /* SAMPLE, POISSON */

  /* Outputs. K = kept blocks, M = kept tokens. */
  lemo_tensor kept;        /* int32 [num_blocks]: kept block ids ascending, -1 from K on */
  lemo_tensor slots;       /* int32 [num_blocks]: position of the block in `kept`, -1 if eliminated */
  lemo_tensor row_offsets; /* int32 [num_blocks + 1]: first packed row of every kept block, M from K on */
  lemo_tensor cu_seqlens;  /* int32 [D + 1]: packed rows of every document */
  lemo_tensor rows;        /* int32 [T]: original token of every packed row, -1 from M on */
  lemo_tensor row_slots;   /* int32 [T]: position in `kept` of every packed row's block, -1 from M on */
  lemo_tensor weights; /* float32 [num_blocks]: by position in `kept`: 1/p (POISSON, not forced) or 1; 0 from K on */
  lemo_tensor info;    /* int32 [LEMO_INFO_SIZE]: see lemo_select_info */
} lemo_select_args;

/* LEMO_NUMERICAL (CPU only, nothing written) in place of a fault; on CUDA the fault is in `info`. */
LEMO_API lemo_status lemo_select(const lemo_exec* exec, const lemo_select_args* args);
LEMO_API lemo_status lemo_select_workspace(const lemo_exec* exec, const lemo_select_args* args, uint64_t* bytes);

/* splitmix64 of (seed, index) mapped to (0, 1): ((z >> 11) + 0.5) * 2^-53, z = mix(seed + (index + 1) * golden). */
LEMO_API double lemo_hash_uniform(uint64_t seed, uint64_t index);

#ifdef __cplusplus
}
#endif
#endif
