#include "training.h"

#include <algorithm>
#include <iterator>

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

// The rows that took part in some layer, ascending. A token that no layer kept would predict from its embedding alone:
// its loss is far off, and no gradient of it reaches a LoRA matrix.
std::vector<int32_t> took_part(const std::vector<std::shared_ptr<const Kept>>& lists) {
  std::vector<int32_t> all = lists.front()->on_host;
  for (size_t i = 1; i < lists.size(); ++i) {
    if (lists[i] == lists[i - 1]) continue;  // shared by layers
    std::vector<int32_t> both;
    std::set_union(all.begin(), all.end(), lists[i]->on_host.begin(), lists[i]->on_host.end(),
                   std::back_inserter(both));
    all = std::move(both);
  }
  return all;
}

// Mean loss of predicting the next token at `rows` [M] of x [T, d], the last layer's output. The head's logits [M, V]
// exist one segment at a time only. With `dx` [T, d] also the gradient at x: the pass that makes the loss makes it too.
double loss(Backend& backend, const Model& model, const Tensor& x, const int32_t* window,
            const std::vector<int32_t>& rows, const Tensor* dx) {
  const auto m = static_cast<int64_t>(rows.size());
  std::vector<int64_t> next;
  // What follows the last token is not in the window.
  for (const int32_t row : rows) next.push_back(row + 1 < x.rows() ? window[row + 1] : kIgnore);
  const Tensor targets = backend.make({m}, LEMO_I64);
  const Tensor list = backend.make({m}, LEMO_I32);
  backend.upload(targets, next.data());
  backend.upload(list, rows.data());

  const Tensor hidden = backend.make({m, model.config.hidden});
  const Tensor last = backend.make({m, model.config.hidden});  // x at `rows`
  auto norm = lemo::make<lemo_gather_norm_args>();
  norm.x = x;
  norm.rows = list;
  norm.weight = model.final_norm;
  norm.norm = LEMO_NORM_RMS;
  norm.eps = model.config.norm_eps;
  norm.packed = last;
  norm.y = hidden;
  backend.run(norm);

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
    backend.zero(*dx);
    auto back = lemo::make<lemo_gather_norm_backward_args>();
    back.dy = hidden;
    back.s = last;
    back.rows = list;
    back.weight = model.final_norm;
    back.norm = LEMO_NORM_RMS;
    back.eps = model.config.norm_eps;
    back.dx = *dx;
    backend.run(back);
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

  const Tensor dx = backend.make({context, model.config.hidden});
  result.loss = loss(backend, model, x, window, took_part(result.lists), &dx);

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
  return loss(backend, model, x, window, selector.everything()->on_host, nullptr);
}

}  // namespace trainer
