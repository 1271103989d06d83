// One decoder layer on its kept rows, forward and backward.
#pragma once

#include <memory>

#include "backend.h"
#include "model.h"
#include "selection.h"

namespace trainer {

// y [M, out] = x [M, in] W^T, plus the low-rank update where the projection has one.
void linear_forward(Backend& backend, const Linear& linear, const Tensor& x, const Tensor& y);

// dx [M, in] = (or +=, with `accumulate`) the gradient at x. Adds to the gradients of the projection's LoRA matrices.
void linear_backward(Backend& backend, const Linear& linear, const Tensor& x, const Tensor& dy, const Tensor& dx,
                     bool accumulate);

// What a layer keeps for its backward pass: its input at the kept rows and the list of them. Everything else is
// computed again, one layer at a time, so that memory grows with layers * M * d.
struct Saved {
  std::shared_ptr<const Kept> kept;
  Tensor input;  // [M, d]
};

// x [T, d], the residual stream, is updated in place at the kept rows; the others pass unchanged. With `save` false
// (evaluation) the result is empty.
Saved layer_forward(Backend& backend, const Model& model, const LayerWeights& layer, const Tensor& x,
                    std::shared_ptr<const Kept> kept, bool save);

// dx [T, d], the gradient of the residual stream, goes from the layer's output to its input in place, likewise.
void layer_backward(Backend& backend, const Model& model, const LayerWeights& layer, const Saved& saved,
                    const Tensor& dx);

// y [M, d] = RMSNorm(x) * weight for all rows of x.
void norm_forward(Backend& backend, const Config& config, const Tensor& weight, const Tensor& x, const Tensor& y);

}  // namespace trainer
