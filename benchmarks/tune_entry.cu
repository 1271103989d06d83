// The functions that benchmarks/tune.py calls in each of its libraries: one sm_90a kernel, packed rows or a row list,
// in bf16. LEMO_TUNE_HEAD_DIM and LEMO_TUNE_PASS (1 forward, 2 backward) choose it.
#include <cstdio>

#include "attention/params.h"
#include "common/sm90/padded_head_dim.h"
#include "src/backend.h"

namespace sm90 = lemo::cuda::attention::sm90;
using lemo::cuda::TensorView;

struct TuneArguments {
  void *q, *k, *v, *out, *dout, *dq, *dk, *dv;
  float* lse;
  const int32_t *cu_seqlens, *rows;
  void *workspace, *stream;
  int64_t storage_rows, capacity;
  int32_t documents, heads, key_heads;
  float scale;
};

constexpr int kHeadDim = LEMO_TUNE_HEAD_DIM;
constexpr int kPaddedHeadDim = lemo::cuda::sm90::padded_head_dim(kHeadDim);

extern "C" __attribute__((visibility("default"))) int64_t tune_workspace(const TuneArguments* a) {
#if LEMO_TUNE_PASS == 1
  (void)a;
  return sizeof(int);
#else
  const lemo::cuda::Documents documents = {a->cu_seqlens, a->rows, a->documents, a->capacity, false};
  return sm90::backward_workspace<kPaddedHeadDim>({documents, a->heads, a->key_heads, /*deterministic=*/false,
                                                   /*listed=*/false, /*list_capacity=*/0});
#endif
}

// 0, or 1 with the reason on stderr.
extern "C" __attribute__((visibility("default"))) int tune_run(const TuneArguments* a) try {
  const auto rows = [](void* data, int64_t heads) { return TensorView{data, heads * kHeadDim, kHeadDim}; };
  const auto stream = static_cast<cudaStream_t>(a->stream);
#if LEMO_TUNE_PASS == 1
  lemo::cuda::attention::ForwardParams params{};
  params.out = rows(a->out, a->heads);
  params.counter = static_cast<int*>(a->workspace);
#else
  lemo::cuda::attention::BackwardParams params{};
  params.dout = rows(a->dout, a->heads);
  params.out = rows(a->out, a->heads);
  params.dq = rows(a->dq, a->heads);
  params.dk = rows(a->dk, a->key_heads);
  params.dv = rows(a->dv, a->key_heads);
  params.key_heads = a->key_heads;
  params.workspace = a->workspace;
#endif
  params.q = rows(a->q, a->heads);
  params.k = rows(a->k, a->key_heads);
  params.v = rows(a->v, a->key_heads);
  params.lse = a->lse;
  params.lse_stride = a->capacity;
  params.documents = params.key_documents = {a->cu_seqlens, a->rows, a->documents, a->capacity, false};
  params.storage_rows = params.key_storage_rows = a->storage_rows;
  params.heads = a->heads;
  params.group = a->heads / a->key_heads;
  params.head_dim = kHeadDim;
  params.scale = a->scale;
#if LEMO_TUNE_PASS == 1
  sm90::launch_forward<kPaddedHeadDim>(params, LEMO_BF16, stream);
#else
  sm90::launch_backward<kPaddedHeadDim>(params, LEMO_BF16, stream);
#endif
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
