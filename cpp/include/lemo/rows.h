/* Kept rows of the residual stream: gather, norm, scatter-add, and their backward passes (paper section 5.1).
 *
 * `rows` (int32 [M]) names the row of the residual stream behind each packed row. Entries of -1 are padding: they
 * gather zeros and scatter nothing. No row appears twice. An absent `rows` means the identity (M = T). */
#ifndef LEMO_ROWS_H
#define LEMO_ROWS_H

#include "lemo/types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* out[i] = weights[slots[i]] * x[rows[i]] */
typedef struct lemo_gather_args {
  uint64_t struct_size;
  lemo_tensor x;       /* [T, d] f32 (CPU), f16/bf16 (CUDA) */
  lemo_tensor rows;    /* int32 [M] */
  lemo_tensor weights; /* optional float32 [K], by block slot */
  lemo_tensor slots;   /* int32 [M], with `weights`: block slot of every packed row */
  lemo_tensor out;     /* out: [M, d], dtype of x */
} lemo_gather_args;
LEMO_API lemo_status lemo_gather(const lemo_exec* exec, const lemo_gather_args* args);

/* In place: x[rows[i]] += y[i]; with `base`: x[rows[i]] = base[i] + y[i]. Sums in fp32, one rounding. */
typedef struct lemo_scatter_add_args {
  uint64_t struct_size;
  lemo_tensor x;    /* inout: [T, d] */
  lemo_tensor rows; /* int32 [M] */
  lemo_tensor y;    /* [M, d], dtype of x */
  lemo_tensor base; /* optional [M, d], dtype of x */
} lemo_scatter_add_args;
LEMO_API lemo_status lemo_scatter_add(const lemo_exec* exec, const lemo_scatter_add_args* args);

/* s_i = x[rows[i]] + residual[i] (residual optional, rounded to the dtype of x);  y = norm(s) * weight + bias.
 * RMS: s * rstd, rstd = 1/sqrt(mean(s^2) + eps);  LAYER: (s - mean) * rstd, rstd = 1/sqrt(var(s) + eps). */
typedef struct lemo_gather_norm_args {
  uint64_t struct_size;
  lemo_tensor x;        /* [T, d] f32 (CPU), f16/bf16 (CUDA) */
  lemo_tensor rows;     /* optional int32 [M] */
  lemo_tensor residual; /* optional [M, d], dtype of x */
  lemo_tensor weight;   /* optional [d], dtype of x or float32 */
  lemo_tensor bias;     /* optional [d], dtype of weight */
  int32_t norm;         /* lemo_norm */
  float eps;

  lemo_tensor y;      /* out: [M, d], dtype of x */
  lemo_tensor packed; /* optional out: [M, d]: s, what backward needs */
} lemo_gather_norm_args;
LEMO_API lemo_status lemo_gather_norm(const lemo_exec* exec, const lemo_gather_norm_args* args);

/* ds = gradient of the norm at s;  dx[rows[i]] = or += ds_i (+ dresidual[i]).  Statistics are recomputed from s. */
typedef struct lemo_gather_norm_backward_args {
  uint64_t struct_size;
  lemo_tensor dy;       /* [M, d] */
  lemo_tensor s;        /* [M, d]: `packed` of the forward pass (or x where neither rows nor residual were given) */
  lemo_tensor weight;   /* optional, as in the forward pass */
  lemo_tensor ds_extra; /* optional [M, d]: gradient that reaches s by another way, added to ds */
  lemo_tensor rows;     /* optional int32 [M]: where ds goes in dx; absent = the identity */
  int32_t norm;         /* lemo_norm */
  float eps;
  int32_t accumulate; /* 0: dx[rows[i]] = ds_i; 1: dx[rows[i]] += ds_i. Other rows of dx are not touched. */
  int32_t reserved;

  lemo_tensor dx;      /* out or inout: [T, d], dtype of dy */
  lemo_tensor dweight; /* optional out: float32 [d] */
  lemo_tensor dbias;   /* optional out: float32 [d] */
} lemo_gather_norm_backward_args;
LEMO_API lemo_status lemo_gather_norm_backward(const lemo_exec* exec, const lemo_gather_norm_backward_args* args);
LEMO_API lemo_status lemo_gather_norm_backward_workspace(const lemo_exec* exec,
                                                         const lemo_gather_norm_backward_args* args, uint64_t* bytes);

#ifdef __cplusplus
}
#endif
#endif
