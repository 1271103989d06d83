/** @file
 * Status codes, tensors and the execution context that every operation shares.
 *
 * Conventions of the whole interface:
 *  - C99. Every struct can be zero-initialized; argument structs begin with `struct_size`, sizeof of the struct that
 *    the caller was compiled with, so that fields can be appended later.
 *  - The library owns no memory: outputs and workspace come from the caller. It never allocates device memory and never
 *    synchronizes a stream.
 *  - Arguments are checked and memory is taken before anything is written: a call that fails leaves every output as it
 *    was, whatever its status. Two exceptions leave outputs undefined: LEMO_CANCELLED, and on CUDA a
 *    LEMO_BACKEND_ERROR of a kernel that was already running.
 *  - Comments of tensors begin with their role. "optional": may be absent. "with" another one: given if that is, and
 *    only then. "out": written; "inout": read and written. All others are read and must be given.
 *  - "float" is the dtype an operation computes in: float32 on the CPU, float16 or bfloat16 on CUDA, the same for all
 *    such tensors of a call.
 *  - Strides count elements, not bytes. The last dimension is contiguous. On CUDA "float" tensors of more than one
 *    dimension, their rows, gradients of matrices, and weight and bias of norms begin at multiples of 16 bytes. Outputs
 *    must not overlap themselves.
 *  - Lists of indices (rows, slots, offsets) are checked on the CPU. On CUDA they are not, since reading them would
 *    synchronize: wrong ones are undefined behavior.
 *  - Reserved fields are 0. A tensor of 0 elements may have data == NULL; it is still present.
 *
 * Letters of shapes: T tokens, M packed (kept) rows, d channels, K block slots; D documents or, as the last dimension
 * of queries and keys, channels of a head. */
#ifndef LEMO_TYPES_H
#define LEMO_TYPES_H

#include <stdint.h>

#if defined(LEMO_STATIC)
#define LEMO_API
#elif defined(_WIN32)
#define LEMO_API __declspec(dllimport)
#else
#define LEMO_API __attribute__((visibility("default")))
#endif

#define LEMO_VERSION_MAJOR 0
#define LEMO_VERSION_MINOR 1
#define LEMO_VERSION_PATCH 0

/** The most dimensions of a tensor. */
#define LEMO_MAX_DIMS 4

#ifdef __cplusplus
extern "C" {
#endif

/** What every function returns; lemo_last_error() has the message. */
typedef enum lemo_status {
  LEMO_OK = 0,
  LEMO_INVALID_ARGUMENT = 1,    /**< a wrong dtype, shape, stride, alignment, range or index */
  LEMO_UNSUPPORTED = 2,         /**< valid, but this backend, build or device has no kernel for it */
  LEMO_WORKSPACE_TOO_SMALL = 3, /**< `workspace` holds fewer bytes than lemo_X_workspace() asked for */
  LEMO_NUMERICAL = 4,           /**< lemo_select on the CPU: an unusable score, or a threshold that keeps nothing */
  LEMO_BACKEND_ERROR = 5,       /**< out of host memory, or an error of the CUDA runtime */
  LEMO_INTERNAL_ERROR = 6,      /**< a bug in lemo */
  LEMO_CANCELLED = 7            /**< `cancel` ended the call (CPU only); outputs are undefined */
} lemo_status;

/** The type of a tensor's elements. */
typedef enum lemo_dtype {
  LEMO_F32 = 0,
  LEMO_F16 = 1,
  LEMO_BF16 = 2,
  LEMO_I32 = 3,
  LEMO_I64 = 4,
  LEMO_U8 = 5
} lemo_dtype;

/** Where tensors lie and operations run. */
typedef enum lemo_device { LEMO_CPU = 0, LEMO_CUDA = 1 } lemo_device;

/** Norms over the channels of a row s. */
typedef enum lemo_norm {
  LEMO_NORM_RMS = 0,  /**< s / sqrt(mean(s^2) + eps) */
  LEMO_NORM_LAYER = 1 /**< (s - mean(s)) / sqrt(var(s) + eps) */
} lemo_norm;

/** A view of memory the caller owns. An absent tensor has ndim == 0. */
typedef struct lemo_tensor {
  void* data;
  int32_t dtype;                 /**< lemo_dtype */
  int32_t ndim;                  /**< 1 to LEMO_MAX_DIMS; 0: absent */
  int64_t shape[LEMO_MAX_DIMS];  /**< elements of each dimension; the first `ndim` count */
  int64_t stride[LEMO_MAX_DIMS]; /**< elements from one entry of a dimension to the next; at least 0 */
} lemo_tensor;

/** Where and how a call runs. All tensors of the call lie on `device`. */
typedef struct lemo_exec {
  uint64_t struct_size;
  int32_t device;          /**< lemo_device */
  int32_t device_index;    /**< ordinal of the CUDA device; ignored on the CPU */
  void* stream;            /**< cudaStream_t, NULL: the default stream; ignored on the CPU */
  void* workspace;         /**< on `device`, aligned to 256 bytes (CPU: 64); NULL if the operation needs none */
  uint64_t workspace_size; /**< in bytes; at least what lemo_X_workspace() returned for the same arguments */
  int32_t deterministic;   /**< 1: bitwise repeatable results, else 0. They are repeatable anyway, except those of
                                lemo_attention_backward on CUDA, which is slower then. */
  int32_t num_threads;     /**< threads on the CPU, 0: all cores; ignored on CUDA. Results do not depend on it. */

  /** Optional: whether to give up a long operation on the CPU. It is called about every 50 ms between tiles of work,
   * only by the thread that made the call, which ends with LEMO_CANCELLED if it returned a value other than 0. It may
   * call lemo itself and must not throw. Ignored on CUDA, where a call returns once its work is queued. */
  int32_t (*cancel)(void* context);
  void* cancel_context; /**< the argument of `cancel` */
} lemo_exec;

/** The blocks of a packed batch: `block_size` consecutive tokens of one document each; only the last block of a
 * document may be shorter. T = offsets[num_blocks] tokens in D documents, none of them empty. */
typedef struct lemo_blocks {
  lemo_tensor offsets;   /**< int32 [num_blocks + 1]: first token of every block, from 0, ascending, T at the end */
  lemo_tensor documents; /**< int32 [D + 1]: first block of every document, from 0, ascending, num_blocks at the end */
  int32_t block_size;    /**< the tokens of every block but the last of a document; at least 1 */
  int32_t reserved;      /**< 0 */
} lemo_blocks;

/** The message of this thread's last failed call, "" if its last call succeeded. It names the argument, what was
 * expected and what was given, in at most 2047 characters. The thread's next lemo call replaces the text; the pointer
 * stays readable until the thread ends. */
LEMO_API const char* lemo_last_error(void);

/** A status in words: "invalid argument". */
LEMO_API const char* lemo_status_string(lemo_status status);

/** "major.minor.patch", of the library at run time; LEMO_VERSION_* are those of the headers. */
LEMO_API const char* lemo_version(void);

/** 1 if this build has the backend and, for LEMO_CUDA, a device can be used; otherwise 0. */
LEMO_API int lemo_has_backend(lemo_device device);

#ifdef __cplusplus
}
#endif
#endif
