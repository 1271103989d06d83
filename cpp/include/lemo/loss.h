/* Output projection and cross-entropy in segments of tokens: logits never exist whole (paper section 5.2).
 *
 *   z = h W^T (+ lora_scale (h A^T) B^T) (+ bias);   softcap c > 0: z = c tanh(z / c)
 *   loss = reduction over tokens with target != ignore_index of  logsumexp(z_t) - z_t[target_t]
 * Gradients are those of `loss` itself (upstream gradient 1), computed in the same pass; each is optional.
 * MEAN over zero valid tokens gives 0 and zero gradients. */
#ifndef LEMO_LOSS_H
#define LEMO_LOSS_H

#include "lemo/types.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum lemo_reduction { LEMO_REDUCE_MEAN = 0, LEMO_REDUCE_SUM = 1 } lemo_reduction;

typedef struct lemo_linear_cross_entropy_args {
  uint64_t struct_size;
  lemo_tensor hidden;  /* [N, d] f32 (CPU), f16/bf16 (CUDA) */
  lemo_tensor weight;  /* [V, d], dtype of hidden */
  lemo_tensor bias;    /* optional [V], dtype of hidden */
  lemo_tensor lora_a;  /* optional [r, d], dtype of hidden */
  lemo_tensor lora_b;  /* [V, r], dtype of hidden; with lora_a */
  lemo_tensor targets; /* int64 [N]: class in [0, V) or ignore_index */
  int64_t ignore_index;
  float lora_scale;
  float softcap;        /* 0 = none */
  int32_t reduction;    /* lemo_reduction */
  int32_t segment_rows; /* tokens per segment, 0 = chosen so that the workspace stays near 128 MiB */

  lemo_tensor loss;    /* out: float32 [1] */
  lemo_tensor valid;   /* out: int64 [1]: number of tokens that count */
  lemo_tensor dhidden; /* optional out: [N, d], dtype of hidden; may be `hidden` itself (in place) */
  lemo_tensor dweight; /* optional out: float32 [V, d] */
  lemo_tensor dbias;   /* optional out: float32 [V] */
  lemo_tensor dlora_a; /* optional out: float32 [r, d] */
  lemo_tensor dlora_b; /* optional out: float32 [V, r] */
} lemo_linear_cross_entropy_args;

/* A target outside [0, V) that is not ignore_index is LEMO_INVALID_ARGUMENT on the CPU; on CUDA it makes the loss NaN.
 */
LEMO_API lemo_status lemo_linear_cross_entropy(const lemo_exec* exec, const lemo_linear_cross_entropy_args* args);
LEMO_API lemo_status lemo_linear_cross_entropy_workspace(const lemo_exec* exec,
                                                         const lemo_linear_cross_entropy_args* args, uint64_t* bytes);

#ifdef __cplusplus
}
#endif
#endif
