/** @file
 * The choice of blocks: scores in, a kept list out, which stays on the device (paper section 4.2, Algorithm 1).
 *
 * Forced blocks are kept whatever their score: the first `always_first` and the last `always_last` of each document. Of
 * a document of n blocks, BUDGET and SAMPLE keep k = min(n, max(floor(keep * n + 0.5), forced blocks, 1)).
 *
 * Pareto sampling (SAMPLE): u_n = lemo_hash_uniform(seed, n); kept are the k smallest of (u / (1 - u)) / (p / (1 - p)),
 * in double precision; forced blocks and those with p >= 0.999 come first. The hash makes every backend draw the same
 * blocks. The size of the draw is fixed, at a price: inclusion probabilities equal p only if all p are equal, and those
 * of pairs are not products. Weights are therefore 1.
 *
 * Poisson sampling (POISSON): block n is kept if u_n < p_n. Inclusion probabilities are p and those of pairs are
 * products, both exactly, so weights 1/p_m 1/p_n make any sum over pairs of blocks unbiased (Horvitz-Thompson). The
 * number of kept blocks varies around the sum of p and may be 0, which is not a fault. */
#ifndef LEMO_SELECT_H
#define LEMO_SELECT_H

#include "lemo/types.h"

#ifdef __cplusplus
extern "C" {
#endif

/** Which blocks are kept. */
typedef enum lemo_select_mode {
  LEMO_SELECT_THRESHOLD = 0, /**< those with scores[n] >= threshold */
  LEMO_SELECT_BUDGET = 1,    /**< of each document the k with the highest scores; ties go to the lower block */
  LEMO_SELECT_SAMPLE = 2,    /**< of each document k by Pareto sampling; `scores` are target probabilities */
  LEMO_SELECT_POISSON = 3    /**< each with probability scores[n], independently of all others */
} lemo_select_mode;

/** The entries of `info`. With a fault, K = M = 0. */
typedef enum lemo_select_info {
  LEMO_INFO_KEPT_BLOCKS = 0,      /**< K */
  LEMO_INFO_KEPT_ROWS = 1,        /**< M */
  LEMO_INFO_LONGEST_DOCUMENT = 2, /**< packed rows of the longest document */
  LEMO_INFO_FAULT = 3,            /**< 0; or 1 + the first block whose score is not finite (SAMPLE, POISSON: not in (0,
                                       1]); or -1 if nothing is kept (except POISSON) */
  LEMO_INFO_SIZE = 4              /**< the number of entries */
} lemo_select_info;

/** Outputs hold K kept blocks and M kept tokens in buffers of full capacity. On the CPU a fault is LEMO_NUMERICAL, and
 * nothing is written; on CUDA the call succeeds and the fault is in `info`. */
typedef struct lemo_select_args {
  uint64_t struct_size;
  lemo_tensor scores;   /**< float32 [num_blocks]; SAMPLE, POISSON: probabilities in (0, 1] */
  lemo_blocks blocks;   /**< of T tokens */
  int32_t mode;         /**< lemo_select_mode */
  float keep;           /**< share of the blocks, in (0, 1]; read by BUDGET and SAMPLE, checked by POISSON too */
  float threshold;      /**< a number, not NaN; read by THRESHOLD */
  int32_t always_first; /**< forced blocks at the start of each document, at least 0 */
  int32_t always_last;  /**< forced blocks at the end of each document, at least 0 */
  int32_t reserved;     /**< 0 */
  uint64_t seed;        /**< read by SAMPLE and POISSON */

  lemo_tensor kept;        /**< out: int32 [num_blocks], kept blocks ascending, -1 from K on */
  lemo_tensor slots;       /**< out: int32 [num_blocks], position of each block in `kept`, -1 if eliminated */
  lemo_tensor row_offsets; /**< out: int32 [num_blocks + 1], first packed row of every kept block, M from K on */
  lemo_tensor cu_seqlens;  /**< out: int32 [D + 1], first packed row of every document, M at the end */
  lemo_tensor rows;        /**< out: int32 [T], token behind every packed row, -1 from M on */
  lemo_tensor row_slots;   /**< out: int32 [T], position in `kept` of every packed row's block, -1 from M on */
  lemo_tensor weights;     /**< out: float32 [num_blocks], by position in `kept`: 1/p of a block that POISSON drew, else
                                1; 0 from K on */
  lemo_tensor info;        /**< out: int32 [LEMO_INFO_SIZE], see lemo_select_info */
} lemo_select_args;
LEMO_API lemo_status lemo_select(const lemo_exec* exec, const lemo_select_args* args);
LEMO_API lemo_status lemo_select_workspace(const lemo_exec* exec, const lemo_select_args* args, uint64_t* bytes);

/** splitmix64 of (seed, index) mapped to (0, 1): ((z >> 11) + 0.5) * 2^-53, z = mix(seed + (index + 1) * golden). */
LEMO_API double lemo_hash_uniform(uint64_t seed, uint64_t index);

#ifdef __cplusplus
}
#endif
#endif
