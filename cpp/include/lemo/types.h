/* lemo: status codes, tensors and the execution context shared by every operation.
 *
 * Conventions of the whole interface:
 *  - C99; every struct can be zero-initialised; every argument struct begins with `struct_size`
 *    (= sizeof of the struct the caller compiled against), so fields can be appended later.
 *  - The library owns no memory: outputs and workspace come from the caller. It never allocates
 *    device memory and never synchronises a stream.
 *  - Arguments are checked and memory is taken before anything is written: a call that fails has left
 *    every output as it was, whatever its status. Only LEMO_CANCELLED leaves outputs undefined, and on
 *    CUDA a LEMO_BACKEND_ERROR of a kernel that was already running.
 *  - Reserved fields are 0. A tensor of 0 elements may have data == NULL; it is still present.
 *  - Strides count elements, not bytes. The last dimension is contiguous unless a field says otherwise.
 */
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

#define LEMO_MAX_DIMS 4

#ifdef __cplusplus
extern "C" {
#endif

typedef enum lemo_status {
  LEMO_OK = 0,
  LEMO_INVALID_ARGUMENT = 1,    /* wrong dtype, shape, stride, alignment, range: see lemo_last_error() */
  LEMO_UNSUPPORTED = 2,         /* valid, but this backend or build has no kernel for it */
  LEMO_WORKSPACE_TOO_SMALL = 3, /* exec.workspace holds fewer bytes than lemo_X_workspace() asked for */
  LEMO_NUMERICAL = 4,           /* non-finite scores, or a selection that keeps nothing (CPU only) */
  LEMO_BACKEND_ERROR = 5,       /* out of host memory, or the text of the CUDA runtime's error in lemo_last_error() */
  LEMO_INTERNAL_ERROR = 6,      /* a bug in lemo */
  LEMO_CANCELLED = 7            /* exec.cancel asked to stop (CPU only); outputs are undefined */
} lemo_status;

typedef enum lemo_dtype {
  LEMO_F32 = 0,
  LEMO_F16 = 1,
  LEMO_BF16 = 2,
  LEMO_I32 = 3,
  LEMO_I64 = 4,
  LEMO_U8 = 5
} lemo_dtype;

typedef enum lemo_device { LEMO_CPU = 0, LEMO_CUDA = 1 } lemo_device;

/* Norms over the last dimension. */
typedef enum lemo_norm {
  LEMO_NORM_RMS = 0,  /* s / sqrt(mean(s^2) + eps) */
  LEMO_NORM_LAYER = 1 /* (s - mean(s)) / sqrt(var(s) + eps) */
} lemo_norm;

/* A view of memory the caller owns. An absent optional tensor has ndim == 0. */
typedef struct lemo_tensor {
  void* data;
  int32_t dtype; /* lemo_dtype */
  int32_t ndim;  /* 1..LEMO_MAX_DIMS; 0 = absent */
  int64_t shape[LEMO_MAX_DIMS];
  int64_t stride[LEMO_MAX_DIMS]; /* in elements */
} lemo_tensor;

/* Where and how a call runs. All tensors of the call live on `device`. */
typedef struct lemo_exec {
  uint64_t struct_size;
  int32_t device;          /* lemo_device */
  int32_t device_index;    /* CUDA ordinal; ignored on the CPU */
  void* stream;            /* cudaStream_t, NULL = default stream; ignored on the CPU */
  void* workspace;         /* at least lemo_X_workspace() bytes, 256-byte aligned, on `device` */
  uint64_t workspace_size; /* bytes */
  int32_t deterministic;   /* 1: bitwise repeatable results, slower where it says so */
  int32_t num_threads;     /* CPU threads, 0 = all cores; ignored on CUDA. Results do not depend on it. */

  /* Optional: whether to give up a long operation on the CPU. Called every 50 ms or so by the thread that made the call
   * and by no other, between tiles of work; the call then ends with LEMO_CANCELLED where it returned a value other than
   * 0. It may call lemo itself and must not throw. Ignored on CUDA, where a call returns once its work is queued. */
  int32_t (*cancel)(void* context);
  void* cancel_context;
} lemo_exec;

/* The blocks of a packed batch: `b` consecutive tokens of one document each, the last block of a document
 * possibly shorter. T = offsets[num_blocks] tokens in D documents. */
typedef struct lemo_blocks {
  lemo_tensor offsets;   /* int32 [num_blocks + 1]: first token of every block, ascending, offsets[num_blocks] = T */
  lemo_tensor documents; /* int32 [D + 1]: first block of every document, ascending, documents[D] = num_blocks */
  int32_t block_size;    /* b: the most tokens a block may have */
  int32_t reserved;
} lemo_blocks;

/* The message of the last failed call of this thread, "" if none. The thread's next lemo call replaces the text; the
 * pointer stays readable until the thread ends. At most 2047 characters.
 * It names the argument, what was expected and what was given. */
LEMO_API const char* lemo_last_error(void);
LEMO_API const char* lemo_status_string(lemo_status status);

/* "major.minor.patch", of the library at run time; LEMO_VERSION_* are those of the headers. */
LEMO_API const char* lemo_version(void);

/* 1 if this build has the backend; for LEMO_CUDA also a usable device must be present. */
LEMO_API int lemo_has_backend(lemo_device device);

#ifdef __cplusplus
}
#endif
#endif
