/** @file
 * Output projection and cross-entropy in segments of tokens: logits never exist as a whole (paper section 5.2).
 *
 *   z = h W^T (+ lora_scale (h A^T) B^T) (+ bias);   softcap c > 0: z = c tanh(z / c);   z(t): row t of z
 *   loss = mean or sum, over tokens t with targets[t] != ignore_index, of logsumexp(z(t)) - z(t)[targets[t]]
 *
 * Gradients are those of `loss` itself (upstream gradient 1), computed in the same pass; each is optional. Over no
 * token, the loss and all gradients are 0. N tokens, V classes, rank r; on CUDA d and r are multiples of 8. */
#ifndef LEMO_LOSS_H
#define LEMO_LOSS_H

#include "lemo/types.h"

#ifdef __cplusplus
extern "C" {
#endif

/** How the losses of tokens become one number. */
typedef enum lemo_reduction { LEMO_REDUCE_MEAN = 0, LEMO_REDUCE_SUM = 1 } lemo_reduction;

/** A target outside of [0, V) that is not `ignore_index` is LEMO_INVALID_ARGUMENT on the CPU; on CUDA it makes the loss
 * NaN. */
typedef struct lemo_linear_cross_entropy_args {
  uint64_t struct_size;
  lemo_tensor hidden;   /**< float [N, d]: h */
  lemo_tensor weight;   /**< float [V, d]: W; V is at least 1 */
  lemo_tensor bias;     /**< optional: float [V] */
  lemo_tensor lora_a;   /**< optional: float [r, d]: A */
  lemo_tensor lora_b;   /**< with `lora_a`: float [V, r]: B */
  lemo_tensor targets;  /**< int64 [N]: classes in [0, V), or `ignore_index` */
  int64_t ignore_index; /**< the target of tokens that do not count */
  float lora_scale;     /**< finite; read if `lora_a` is given */
  float softcap;        /**< finite, at least 0; 0: none */
  int32_t reduction;    /**< lemo_reduction */
  int32_t segment_rows; /**< tokens per segment; 0: chosen so that the workspace stays near 128 MiB */

  lemo_tensor loss;    /**< out: float32 [1] */
  lemo_tensor valid;   /**< out: int64 [1], the number of tokens that count */
  lemo_tensor dhidden; /**< optional out: float [N, d]; may be `hidden` itself (in place) */
  lemo_tensor dweight; /**< optional out: float32 [V, d] */
  lemo_tensor dbias;   /**< optional out: float32 [V]; does not need `bias` */
  lemo_tensor dlora_a; /**< optional out: float32 [r, d]; needs `lora_a` */
  lemo_tensor dlora_b; /**< optional out: float32 [V, r]; needs `lora_a` */
} lemo_linear_cross_entropy_args;
LEMO_API lemo_status lemo_linear_cross_entropy(const lemo_exec* exec, const lemo_linear_cross_entropy_args* args);
LEMO_API lemo_status lemo_linear_cross_entropy_workspace(const lemo_exec* exec,
                                                         const lemo_linear_cross_entropy_args* args, uint64_t* bytes);

#ifdef __cplusplus
}
#endif
#endif
