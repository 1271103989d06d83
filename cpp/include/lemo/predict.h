/* Predicted informativeness of token blocks from the residual stream (paper eq. 3).
 *
 * Two small networks, one for queries (q) and one for keys (k), without biases:
 *   z_t = x_t * r_t,  r_t = 1 / sqrt(mean(x_t^2) + eps)              (RMS)
 *                     r_t = 1 / sqrt(var(x_t) + eps)                 (LAYER: about the mean)
 *   a_t = relu(W2 relu(W1 z_t));  p_n = pool over t in block n of a_t;  y_n = W3 p_n
 *   I(n) = sum over m >= n in the same document of yq_m . yk_n      (normalize: divided by the number of such m)
 * The column sums come from a suffix sum of yq: no num_blocks x num_blocks matrix exists.
 * LAYER does not subtract the mean from x: fold it into W1 (make each of its rows sum to zero). */
#ifndef LEMO_PREDICT_H
#define LEMO_PREDICT_H

#include "lemo/types.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum lemo_pool { LEMO_POOL_MEAN = 0, LEMO_POOL_MAX = 1 } lemo_pool;

typedef struct lemo_predict_args {
  uint64_t struct_size;
  lemo_tensor x; /* [T, d] f32 (CPU), f16/bf16 (CUDA) */
  /* Same dtype as x. Sizes need not agree between q and k, except that both last sizes are c.
   * On CUDA every r, s and c is a multiple of 8 (pad with zero rows). */
  lemo_tensor wq1; /* [rq, d] */
  lemo_tensor wq2; /* [sq, rq] */
  lemo_tensor wq3; /* [c, sq] */
  lemo_tensor wk1; /* [rk, d] */
  lemo_tensor wk2; /* [sk, rk] */
  lemo_tensor wk3; /* [c, sk] */
  lemo_blocks blocks;
  int32_t norm; /* lemo_norm */
  int32_t pool; /* lemo_pool */
  float eps;
  int32_t normalize;

  lemo_tensor scores;  /* out: float32 [num_blocks] */
  lemo_tensor queries; /* optional out: float32 [num_blocks, c]: yq */
  lemo_tensor keys;    /* optional out: float32 [num_blocks, c]: yk */
} lemo_predict_args;

LEMO_API lemo_status lemo_predict(const lemo_exec* exec, const lemo_predict_args* args);
LEMO_API lemo_status lemo_predict_workspace(const lemo_exec* exec, const lemo_predict_args* args, uint64_t* bytes);

#ifdef __cplusplus
}
#endif
#endif
