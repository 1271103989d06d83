// A window of tokens through the whole model: loss, gradients, evaluation.
#pragma once

#include <cstdint>
#include <vector>

#include "backend.h"
#include "model.h"
#include "selection.h"

namespace trainer {

struct StepResult {
  double loss;                                     // mean cross-entropy of the next token, over tokens that took part
  double kept;                                     // fraction of the tokens that the layers worked on, mean over layers
  std::vector<std::shared_ptr<const Kept>> lists;  // of every layer
};

// Forward and backward pass over one window of `context` tokens, its length; gradients are added to the adapter's.
// The selector has begun the step.
StepResult train_step(Backend& backend, const Model& model, Selector& selector, const int32_t* window, int64_t context);

// The loss of the dense model.
double evaluate(Backend& backend, const Model& model, const Selector& selector, const int32_t* window, int64_t context);

}  // namespace trainer
