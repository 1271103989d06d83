// Which blocks of tokens take part in a layer.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "backend.h"
#include "model.h"

namespace trainer {

// The rows of the residual stream that a layer works on: M of T, ascending, whole blocks.
struct Kept {
  Tensor list;                   // int32 [T]: rows() are its first M
  Tensor cu_seqlens;             // int32 [2]: {0, M}
  int64_t count = 0;             // M
  std::vector<int32_t> on_host;  // the same M rows

  lemo_tensor rows() const { return list.first(count); }  // int32 [M]
};

// How blocks are chosen. All policies keep the first block: everything attends to it.
enum class Policy {
  kRandom,      // one seeded draw a step, for all layers (LEMO_SELECT_SAMPLE)
  kExact,       // in every layer those with the highest attention scores (lemo_scores, LEMO_SELECT_BUDGET): costly
  kPredictors,  // the same with scores that calibrated predictors estimate (lemo_predict)
};

// Predictors written by `lemo calibrate`, on the device.
struct Predictors {
  std::vector<lemo_predict_args> layers;  // weights, norm, pool, eps and normalize filled in
  std::vector<Tensor> weights;            // what the arguments point to
  int64_t block_size = 0;

  static Predictors load(Backend& backend, const std::string& folder, const Config& config);
};

// Chooses the blocks of one window of `context` tokens, which counts as one document.
class Selector {
 public:
  struct Options {
    Policy policy = Policy::kRandom;
    float keep = 0.5f;  // fraction of the blocks
    int64_t block = 64;
    uint64_t seed = 0;
    std::string calibration;  // folder, for kPredictors
  };

  Selector(Backend& backend, const Model& model, const Options& options, int64_t context);

  // Begins training step `step`, in which everything is kept where `dense`.
  void begin(int64_t step, bool dense);

  // The list of layer `layer`, whose input is x [T, d]. Layers may share one.
  std::shared_ptr<const Kept> choose(int64_t layer, const Tensor& x);

  const std::shared_ptr<const Kept>& everything() const { return everything_; }

 private:
  std::shared_ptr<const Kept> select(lemo_select_args args);
  Tensor exact_scores(const LayerWeights& layer, const Tensor& x);
  Tensor predicted_scores(int64_t layer, const Tensor& x);

  Backend& backend_;
  const Model& model_;
  Options options_;
  int64_t context_;
  int64_t num_blocks_;
  Tensor offsets_;        // int32 [num_blocks + 1]: first token of every block
  Tensor documents_;      // int32 [2]: {0, num_blocks}
  Tensor probabilities_;  // float32 [num_blocks]: `keep` for every block
  lemo_blocks blocks_;
  Predictors predictors_;
  std::shared_ptr<const Kept> everything_;
  std::shared_ptr<const Kept> shared_;  // the list of all layers of this step, if there is one
};

}  // namespace trainer
