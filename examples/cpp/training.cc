#include "training.h"

#include "layer.h"

namespace trainer {
namespace {

constexpr int64_t kIgnore = -100;

Tensor embed(Backend& backend, const Model& model, const int32_t* window, int64_t context) {
  const Tensor tokens = backend.make({context}, LEMO_I32);
  backend.upload(tokens, window);
  Tensor x = backend.make({context, model.config.hidden});
  backend.embed(x, model.embedding, tokens);
  return x;
}

// Mean loss of predicting each next token from x [T, d], the last layer's output. The head's logits [T, V] exist one
// segment at a time only. With `dx` [T, d] also the gradient at x; the pass that makes the loss makes it too.
double loss(Backend& backend, const Model& model, const Tensor& x, const int32_t* window, const Tensor* dx) {
  const int64_t context = x.rows();
  std::vector<int64_t> next(window + 1, window + context);
  next.push_back(kIgnore);  // what follows the last token is not in the window
  const Tensor targets = backend.make({context}, LEMO_I64);
  backend.upload(targets, next.data());

  const Tensor hidden = backend.make({context, model.config.hidden});
  norm_forward(backend, model.config, model.final_norm, x, hidden);

  const Tensor value = backend.make({1}, LEMO_F32);
  const Tensor valid = backend.make({1}, LEMO_I64);
  auto args = lemo::make<lemo_linear_cross_entropy_args>();
  args.hidden = hidden;
  args.weight = model.head;
  args.targets = targets;
  args.ignore_index = kIgnore;
  args.reduction = LEMO_REDUCE_MEAN;
  args.loss = value;
  args.valid = valid;
  if (dx != nullptr) args.dhidden = hidden;  // in place: hidden is not needed any more
  backend.run(args);

  if (dx != nullptr) {
    auto norm = lemo::make<lemo_gather_norm_backward_args>();
    norm.dy = hidden;
    norm.s = x;
    norm.weight = model.final_norm;
    norm.norm = LEMO_NORM_RMS;
    norm.eps = model.config.norm_eps;
    norm.dx = *dx;
    backend.run(norm);
  }
  return backend.download_floats(value)[0];
}

}  // namespace

StepResult train_step(Backend& backend, const Model& model, Selector& selector, const int32_t* window,
                      int64_t context) {
  const Tensor x = embed(backend, model, window, context);
  StepResult result{};
  std::vector<Saved> saved;
  for (size_t i = 0; i < model.layers.size(); ++i) {
    auto kept = selector.choose(static_cast<int64_t>(i), x);
    result.kept += static_cast<double>(kept->count) / static_cast<double>(context);
    result.lists.push_back(kept);
    saved.push_back(layer_forward(backend, model, model.layers[i], x, std::move(kept), true));
  }
  result.kept /= static_cast<double>(model.layers.size());

  // Eliminated tokens predict, too: their residual stream went through fewer layers, or none.
  const Tensor dx = backend.make({context, model.config.hidden});
  result.loss = loss(backend, model, x, window, &dx);

  for (size_t i = model.layers.size(); i-- > 0;) {
    layer_backward(backend, model, model.layers[i], saved[i], dx);
    saved.pop_back();  // its memory serves the next layer
  }
  return result;
}

double evaluate(Backend& backend, const Model& model, const Selector& selector, const int32_t* window,
                int64_t context) {
  const Tensor x = embed(backend, model, window, context);
  for (const LayerWeights& layer : model.layers) {
    layer_forward(backend, model, layer, x, selector.everything(), false);
  }
  return loss(backend, model, x, window, nullptr);
}

}  // namespace trainer
