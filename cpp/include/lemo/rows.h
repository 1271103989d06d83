/** @file
 * Kept rows of the residual stream: gather, norm, scatter-add, and their backward passes (paper section 5.1).
 *
 * `rows` names the row of the residual stream behind each of M packed rows. Entries of -1 are padding: they gather
 * zeros and scatter nothing. Where rows are written, none may appear twice. An absent `rows` means the identity, M = T.
 * On CUDA d is a multiple of 8, and at most 16384 for the norms. */
#ifndef LEMO_ROWS_H
#define LEMO_ROWS_H

#include "lemo/types.h"

#ifdef __cplusplus
extern "C" {
#endif

/** out[i] = weights[slots[i]] * x[rows[i]], or x[rows[i]] without `weights`. */
typedef struct lemo_gather_args {
  uint64_t struct_size;
  lemo_tensor x;       /**< float [T, d] */
  lemo_tensor rows;    /**< optional: int32 [M], rows of `x` or -1 */
  lemo_tensor weights; /**< optional: float32 [K], by block slot */
  lemo_tensor slots;   /**< with `weights`: int32 [M], the block slot of every packed row; not read at padding */
  lemo_tensor out;     /**< out: float [M, d] */
} lemo_gather_args;
LEMO_API lemo_status lemo_gather(const lemo_exec* exec, const lemo_gather_args* args);

/** In place: x[rows[i]] += y[i]; with `base`: x[rows[i]] = base[i] + y[i]. Sums in float32, rounded once. */
typedef struct lemo_scatter_add_args {
  uint64_t struct_size;
  lemo_tensor x;    /**< inout: float [T, d]; rows that `rows` does not name are not touched */
  lemo_tensor rows; /**< optional: int32 [M], rows of `x` or -1, none twice */
  lemo_tensor y;    /**< float [M, d] */
  lemo_tensor base; /**< optional: float [M, d] */
} lemo_scatter_add_args;
LEMO_API lemo_status lemo_scatter_add(const lemo_exec* exec, const lemo_scatter_add_args* args);

/** s_i = x[rows[i]] + residual[i], rounded to the dtype of `x`;  y_i = norm(s_i) * weight + bias. */
typedef struct lemo_gather_norm_args {
  uint64_t struct_size;
  lemo_tensor x;        /**< float [T, d] */
  lemo_tensor rows;     /**< optional: int32 [M], rows of `x` or -1 */
  lemo_tensor residual; /**< optional: float [M, d]; absent: 0 */
  lemo_tensor weight;   /**< optional: float or float32 [d]; absent: 1 */
  lemo_tensor bias;     /**< optional: [d] in the dtype of `weight`; needs `weight`; absent: 0 */
  int32_t norm;         /**< lemo_norm */
  float eps;            /**< finite, at least 0 */

  lemo_tensor y;      /**< out: float [M, d] */
  lemo_tensor packed; /**< optional out: float [M, d], s: what the backward pass needs */
} lemo_gather_norm_args;
LEMO_API lemo_status lemo_gather_norm(const lemo_exec* exec, const lemo_gather_norm_args* args);

/** ds_i = gradient of the norm at s_i, plus ds_extra[i];  dx[rows[i]] = ds_i, or += ds_i. The statistics of the norm
 * are computed again from `s`. Padding contributes nothing, to the gradients of the parameters neither. */
typedef struct lemo_gather_norm_backward_args {
  uint64_t struct_size;
  lemo_tensor dy;       /**< float [M, d] */
  lemo_tensor s;        /**< float [M, d]: `packed` of the forward pass (or its x, without rows and residual) */
  lemo_tensor weight;   /**< optional: as in the forward pass */
  lemo_tensor ds_extra; /**< optional: float [M, d], the gradient that reaches s by other paths */
  lemo_tensor rows;     /**< optional: int32 [M], rows of `dx` or -1, none twice; absent: the identity, T = M */
  int32_t norm;         /**< lemo_norm, as in the forward pass */
  float eps;            /**< as in the forward pass */
  int32_t accumulate;   /**< 0: dx[rows[i]] = ds_i; 1: dx[rows[i]] += ds_i */
  int32_t reserved;     /**< 0 */

  lemo_tensor dx;      /**< inout: float [T, d]; rows that `rows` does not name are not touched */
  lemo_tensor dweight; /**< optional out: float32 [d], the sum over i of dy_i * norm(s_i) */
  lemo_tensor dbias;   /**< optional out: float32 [d], the sum over i of dy_i */
} lemo_gather_norm_backward_args;
LEMO_API lemo_status lemo_gather_norm_backward(const lemo_exec* exec, const lemo_gather_norm_backward_args* args);
LEMO_API lemo_status lemo_gather_norm_backward_workspace(const lemo_exec* exec,
                                                         const lemo_gather_norm_backward_args* args, uint64_t* bytes);

#ifdef __cplusplus
}
#endif
#endif
