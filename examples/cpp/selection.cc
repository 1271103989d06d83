#include "selection.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "error.h"
#include "json.h"
#include "layer.h"
#include "safetensors.h"

namespace trainer {
namespace {

// One 63-bit seed from several integers, by splitmix64 steps. The same function as in lemo's Python engine, so that
// both draw the same blocks for one seed and step.
template <class... Values>
uint64_t mix_seed(Values... values) {
  uint64_t z = 0;
  for (const uint64_t value : {static_cast<uint64_t>(values)...}) {
    z += value + UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    z ^= z >> 31;
  }
  return z >> 1;
}

constexpr int64_t kMicroBatch = 0;  // a step is one window
constexpr int64_t kAllLayers = 0;   // what a shared draw is numbered by

constexpr std::array<const char*, 6> kPredictorWeights = {"wq1", "wq2", "wq3", "wk1", "wk2", "wk3"};

}  // namespace

Predictors Predictors::load(Backend& backend, const std::string& folder, const Config& config) {
  const std::string path = folder + "/lemo_config.json";
  const Json document = Json::read(path);
  const auto need = [&](const char* name) -> const Json& {
    const Json* value = document.find(name);
    if (value == nullptr) fail(path, ": ", name, " is missing; expected a folder written by `lemo calibrate`");
    return *value;
  };
  const int64_t version = need("format_version").integer(path);
  if (version != 1 && version != 2) fail(path, ": format version ", version, " is not supported; expected 1 or 2");
  if (version == 2 && need("target").string(path) != "importance") {  // version 1 has no other target
    fail(path, ": made for the target ", need("target").string(path),
         "; expected importance, as `lemo calibrate` makes it without --target");
  }
  Predictors result;
  result.block_size = need("block_size").integer(path);
  auto common = lemo::make<lemo_predict_args>();
  common.norm = need("norm").string(path) == "rms" ? LEMO_NORM_RMS : LEMO_NORM_LAYER;
  common.pool = need("pool").string(path) == "mean" ? LEMO_POOL_MEAN : LEMO_POOL_MAX;
  common.eps = static_cast<float>(need("eps").number(path));
  common.normalize = need("normalize").boolean(path) ? 1 : 0;
  const Json::Array& sizes = need("sizes").array(path);
  if (static_cast<int64_t>(sizes.size()) != config.layers) {
    fail(path, ": calibrated for ", sizes.size(), " layers, the model has ", config.layers);
  }
  const Safetensors file = Safetensors::open_file(folder + "/predictors.safetensors");
  for (size_t i = 0; i < sizes.size(); ++i) {
    lemo_predict_args args = common;
    const std::array<lemo_tensor*, 6> fields = {&args.wq1, &args.wq2, &args.wq3, &args.wk1, &args.wk2, &args.wk3};
    for (size_t w = 0; w < fields.size(); ++w) {
      const Json::Array& shape = sizes[i].array(path).at(w).array(path);
      const std::vector<int64_t> expected = {shape.at(0).integer(path), shape.at(1).integer(path)};
      const std::string name = "layers." + std::to_string(i) + "." + kPredictorWeights[w];
      Tensor weight = backend.make({expected[0], expected[1]});
      backend.upload_floats(weight, file.get(name, expected).floats().data());
      *fields[w] = weight;
      result.weights.push_back(std::move(weight));
    }
    result.layers.push_back(args);
  }
  return result;
}

Selector::Selector(Backend& backend, const Model& model, const Options& options, int64_t context)
    : backend_(backend), model_(model), options_(options), context_(context) {
  if (options.policy == Policy::kPredictors) {
    predictors_ = Predictors::load(backend, options.calibration, model.config);
    if (predictors_.block_size != options.block) {
      fail("--block: ", options.calibration, " was calibrated for blocks of ", predictors_.block_size, " tokens, got ",
           options.block);
    }
  }
  std::vector<int32_t> offsets;
  for (int64_t at = 0; at < context; at += options.block) offsets.push_back(static_cast<int32_t>(at));
  num_blocks_ = static_cast<int64_t>(offsets.size());
  offsets.push_back(static_cast<int32_t>(context));
  const std::array<int32_t, 2> documents = {0, static_cast<int32_t>(num_blocks_)};
  const std::vector<float> probabilities(static_cast<size_t>(num_blocks_), options.keep);
  offsets_ = backend.make({num_blocks_ + 1}, LEMO_I32);
  documents_ = backend.make({2}, LEMO_I32);
  probabilities_ = backend.make({num_blocks_}, LEMO_F32);
  backend.upload(offsets_, offsets.data());
  backend.upload(documents_, documents.data());
  backend.upload(probabilities_, probabilities.data());
  blocks_ = {};
  blocks_.offsets = offsets_;
  blocks_.documents = documents_;
  blocks_.block_size = static_cast<int32_t>(options.block);

  auto args = lemo::make<lemo_select_args>();
  args.scores = probabilities_;
  args.mode = LEMO_SELECT_BUDGET;
  args.keep = 1.0f;
  everything_ = select(args);
}

void Selector::begin(int64_t step, bool dense) {
  shared_ = nullptr;
  if (dense || options_.keep == 1.0f) {
    shared_ = everything_;
  } else if (options_.policy == Policy::kRandom) {
    // Equal probabilities: a uniform draw of keep * num_blocks blocks.
    auto args = lemo::make<lemo_select_args>();
    args.scores = probabilities_;
    args.mode = LEMO_SELECT_SAMPLE;
    args.keep = options_.keep;
    args.seed = mix_seed(mix_seed(options_.seed, step, kMicroBatch), kAllLayers);
    shared_ = select(args);
  }
}

std::shared_ptr<const Kept> Selector::choose(int64_t layer, const Tensor& x) {
  if (shared_ != nullptr) return shared_;
  const Tensor scores = options_.policy == Policy::kExact ? exact_scores(model_.layers[static_cast<size_t>(layer)], x)
                                                          : predicted_scores(layer, x);
  auto args = lemo::make<lemo_select_args>();
  args.scores = scores;
  args.mode = LEMO_SELECT_BUDGET;
  args.keep = options_.keep;
  return select(args);
}

// Fills in what all selections have in common. The list and its sizes are made on the device; reading the sizes is the
// one place where a step waits for it.
std::shared_ptr<const Kept> Selector::select(lemo_select_args args) {
  auto kept = std::make_shared<Kept>();
  kept->list = backend_.make({context_}, LEMO_I32);
  kept->cu_seqlens = backend_.make({2}, LEMO_I32);
  const Tensor blocks = backend_.make({num_blocks_}, LEMO_I32);
  const Tensor slots = backend_.make({num_blocks_}, LEMO_I32);
  const Tensor row_offsets = backend_.make({num_blocks_ + 1}, LEMO_I32);
  const Tensor row_slots = backend_.make({context_}, LEMO_I32);
  const Tensor weights = backend_.make({num_blocks_}, LEMO_F32);
  const Tensor info = backend_.make({LEMO_INFO_SIZE}, LEMO_I32);
  args.blocks = blocks_;
  args.always_first = 1;
  args.kept = blocks;
  args.slots = slots;
  args.row_offsets = row_offsets;
  args.cu_seqlens = kept->cu_seqlens;
  args.rows = kept->list;
  args.row_slots = row_slots;
  args.weights = weights;
  args.info = info;
  backend_.run(args);
  std::array<int32_t, LEMO_INFO_SIZE> values;
  backend_.download(values.data(), info);
  const int32_t fault = values[LEMO_INFO_FAULT];
  if (fault != 0) fail("selection: the score of block ", fault - 1, " is not finite; lower --lr");
  kept->count = values[LEMO_INFO_KEPT_ROWS];
  kept->on_host.resize(static_cast<size_t>(kept->count));
  backend_.download(kept->on_host.data(), kept->rows());
  return kept;
}

// The layer's own queries and keys of all tokens, as in attention; lemo_scores adds up what every block receives.
Tensor Selector::exact_scores(const LayerWeights& layer, const Tensor& x) {
  const Config& c = model_.config;
  const int64_t tokens = x.rows();
  const Tensor h = backend_.make({tokens, c.hidden});
  const Tensor q = backend_.make({tokens, c.query_heads * c.head_dim});
  const Tensor k = backend_.make({tokens, c.key_heads * c.head_dim});
  norm_forward(backend_, c, layer.input_norm, x, h);
  linear_forward(backend_, layer.q, h, q);
  linear_forward(backend_, layer.k, h, k);
  auto args = lemo::make<lemo_scores_args>();
  args.q = q.as({tokens, c.query_heads, c.head_dim});
  args.k = k.as({tokens, c.key_heads, c.head_dim});
  backend_.rotate(args.q, model_.angles, everything_->rows(), 1.0f);
  backend_.rotate(args.k, model_.angles, everything_->rows(), 1.0f);
  const Tensor scores = backend_.make({num_blocks_}, LEMO_F32);
  args.blocks = blocks_;
  args.scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
  args.scores = scores;
  backend_.run(args);
  return scores;
}

Tensor Selector::predicted_scores(int64_t layer, const Tensor& x) {
  const Tensor scores = backend_.make({num_blocks_}, LEMO_F32);
  lemo_predict_args args = predictors_.layers[static_cast<size_t>(layer)];
  args.x = x;
  args.blocks = blocks_;
  args.scores = scores;
  backend_.run(args);
  return scores;
}

}  // namespace trainer
