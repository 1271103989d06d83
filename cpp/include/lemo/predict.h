/** @file
 * Predicted informativeness of token blocks from the residual stream (paper eq. 3).
 *
 * Two small networks, one for queries (q) and one for keys (k), without biases:
 *
 *   z_t = x_t * r_t,  r_t = 1 / sqrt(mean(x_t^2) + eps)              (LEMO_NORM_RMS)
 *                     r_t = 1 / sqrt(var(x_t) + eps)                 (LEMO_NORM_LAYER: about the mean)
 *   a_t = relu(W2 relu(W1 z_t));  p_n = pool over t in block n of a_t;  y_n = W3 p_n
 *   I(n) = sum over m >= n in the same document of yq_m . yk_n       (normalize: divided by the number of such m)
 *
 * The sums over m come from a suffix sum of yq: no num_blocks x num_blocks matrix exists. LEMO_NORM_LAYER does not
 * subtract the mean from x: fold it into W1 (make each of its rows sum to zero).
 *
 * The layer sizes r and s may differ between the two networks; c is common. On CUDA d and all layer sizes are multiples
 * of 8 (pad with zero rows and columns). */
#ifndef LEMO_PREDICT_H
#define LEMO_PREDICT_H

#include "lemo/types.h"

#ifdef __cplusplus
extern "C" {
#endif

/** How the activations of a block's tokens become one vector. */
typedef enum lemo_pool { LEMO_POOL_MEAN = 0, LEMO_POOL_MAX = 1 } lemo_pool;

/** Scores of the blocks of one layer from the residual stream that enters it. */
typedef struct lemo_predict_args {
  uint64_t struct_size;
  lemo_tensor x;      /**< float [T, d] */
  lemo_tensor wq1;    /**< float [rq, d] */
  lemo_tensor wq2;    /**< float [sq, rq] */
  lemo_tensor wq3;    /**< float [c, sq] */
  lemo_tensor wk1;    /**< float [rk, d] */
  lemo_tensor wk2;    /**< float [sk, rk] */
  lemo_tensor wk3;    /**< float [c, sk] */
  lemo_blocks blocks; /**< of the T tokens */
  int32_t norm;       /**< lemo_norm */
  int32_t pool;       /**< lemo_pool */
  float eps;          /**< finite, at least 0 */
  int32_t normalize;  /**< 1: each score is divided by the number of its terms; else 0 */

  lemo_tensor scores;  /**< out: float32 [num_blocks], I */
  lemo_tensor queries; /**< optional out: float32 [num_blocks, c], yq */
  lemo_tensor keys;    /**< optional out: float32 [num_blocks, c], yk */
} lemo_predict_args;
LEMO_API lemo_status lemo_predict(const lemo_exec* exec, const lemo_predict_args* args);
LEMO_API lemo_status lemo_predict_workspace(const lemo_exec* exec, const lemo_predict_args* args, uint64_t* bytes);

#ifdef __cplusplus
}
#endif
#endif
