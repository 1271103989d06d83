/** @file
 * The elementwise parts of a layer, each in one pass over memory: rotary positions, SwiGLU and ReLU, and their backward
 * passes. Arithmetic in float32, every result rounded once.
 *
 * Outputs may lie in the memory of inputs of the same shape, dtype and strides, as the functions say. On CUDA f is a
 * multiple of 8. */
#ifndef LEMO_ELEMENTWISE_H
#define LEMO_ELEMENTWISE_H

#include "lemo/types.h"

#ifdef __cplusplus
extern "C" {
#endif

/** Rotary position embedding: rotates the pairs (j, j + D / 2) of every head by the angles of the row's position.
 *
 *   out[i, h, j]         = cos[r, j] * x[i, h, j]         - sin[r, j] * x[i, h, j + D / 2]
 *   out[i, h, j + D / 2] = cos[r, j] * x[i, h, j + D / 2] + sin[r, j] * x[i, h, j],     j < D / 2, r = rows[i]
 *
 * With `inverse` the sign of sin changes: the backward pass, as the operation is linear in x. `out` may be `x`. */
typedef struct lemo_rotary_args {
  uint64_t struct_size;
  lemo_tensor x;    /**< float [M, H, D], D even; rows and heads may be strided */
  lemo_tensor cos;  /**< float or float32 [T, D]; the second half of a row repeats the first and is not read */
  lemo_tensor sin;  /**< float or float32 [T, D], as `cos` */
  lemo_tensor rows; /**< optional: int32 [M], rows of `cos` and `sin`; -1 is padding, whose rows of `out` become 0.
                         Rows may repeat. Absent: the identity, M = T */
  int32_t inverse;  /**< 0, or 1: rotate by the negative angles */
  int32_t reserved; /**< 0 */

  lemo_tensor out; /**< out: float [M, H, D] */
} lemo_rotary_args;
LEMO_API lemo_status lemo_rotary(const lemo_exec* exec, const lemo_rotary_args* args);

/** out = silu(gate) * up, where silu(z) = z / (1 + exp(-z)). `out` may be `gate` or `up`. */
typedef struct lemo_swiglu_args {
  uint64_t struct_size;
  lemo_tensor gate; /**< float [M, f]; rows may be strided, as halves of one projection are */
  lemo_tensor up;   /**< float [M, f]; rows may be strided */

  lemo_tensor out; /**< out: float [M, f] */
} lemo_swiglu_args;
LEMO_API lemo_status lemo_swiglu(const lemo_exec* exec, const lemo_swiglu_args* args);

/** dgate = dout * up * silu'(gate), dup = dout * silu(gate), where silu'(z) = s (1 + z (1 - s)), s = 1 / (1 + exp(-z)).
 * `dgate` and `dup` may be any two of `dout`, `gate` and `up`. */
typedef struct lemo_swiglu_backward_args {
  uint64_t struct_size;
  lemo_tensor dout; /**< float [M, f]; rows may be strided */
  lemo_tensor gate; /**< float [M, f], as in the forward pass */
  lemo_tensor up;   /**< float [M, f], as in the forward pass */

  lemo_tensor dgate; /**< out: float [M, f] */
  lemo_tensor dup;   /**< out: float [M, f] */
} lemo_swiglu_backward_args;
LEMO_API lemo_status lemo_swiglu_backward(const lemo_exec* exec, const lemo_swiglu_backward_args* args);

/** out = x <= 0 ? 0 : x, and all that the gradient needs of it, one bit an element: !(x <= 0), which NaN has as well.
 * `out` may be `x`. */
typedef struct lemo_relu_args {
  uint64_t struct_size;
  lemo_tensor x; /**< float [M, f]; rows may be strided */

  lemo_tensor out;  /**< out: float [M, f] */
  lemo_tensor bits; /**< out: uint8 [M, ceil(f / 8)]; element j is bit j % 8 of byte j / 8, bits from f on are 0 */
} lemo_relu_args;
LEMO_API lemo_status lemo_relu(const lemo_exec* exec, const lemo_relu_args* args);

/** dx = dout where the bit is set, 0 elsewhere. `dx` may be `dout`. */
typedef struct lemo_relu_backward_args {
  uint64_t struct_size;
  lemo_tensor dout; /**< float [M, f]; rows may be strided */
  lemo_tensor bits; /**< uint8 [M, ceil(f / 8)], of the forward pass */

  lemo_tensor dx; /**< out: float [M, f] */
} lemo_relu_backward_args;
LEMO_API lemo_status lemo_relu_backward(const lemo_exec* exec, const lemo_relu_backward_args* args);

#ifdef __cplusplus
}
#endif
#endif
