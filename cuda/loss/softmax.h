// The parts of the loss around its matrix products.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "src/backend.h"

namespace lemo::cuda {

// Gradients of logits lie in half precision as kGradientScale * (p - onehot): probabilities of a large vocabulary
// would otherwise be denormal in float16. The products that consume them divide it out again.
constexpr float kGradientScale = 1024.0f;

// What the gradient products multiply by, in device memory because it depends on the number of valid tokens.
struct LossScales {
  float gradient;       // 1 / kGradientScale, divided by the valid tokens for a mean
  float lora_gradient;  // lora_scale * gradient
};

// Counts the targets that are not ignore_index.
void count_valid(cudaStream_t stream, const int64_t* targets, int64_t count, int64_t ignore_index, bool mean,
                 float lora_scale, int64_t* valid, LossScales* scales);

struct SoftmaxArgs {
  int32_t dtype;
  void* logits;  // [rows, stride]; overwritten with scaled gradients if `gradient`, zeros from `classes` on
  int64_t rows, classes, stride;
  const void* bias;  // [classes] or NULL
  const int64_t* targets;
  int64_t ignore_index;
  float softcap;
  bool gradient;
  float* losses;  // [rows]
};
void softmax_loss(cudaStream_t stream, const SoftmaxArgs& args);

// sums [classes] = (accumulate ? sums : 0) + scales->gradient * column sums of the gradients that softmax_loss left in
// args.logits.
void sum_columns(cudaStream_t stream, const SoftmaxArgs& args, const LossScales* scales, bool accumulate, float* sums);

// loss = sum of losses [count], in double precision and a fixed order; divided by *valid for a mean (0 if none).
void reduce_loss(cudaStream_t stream, const float* losses, int64_t count, bool mean, const int64_t* valid, float* loss);

}  // namespace lemo::cuda
