#include "model.h"

#include <cmath>
#include <filesystem>

#include "error.h"
#include "json.h"

namespace trainer {
namespace {

constexpr double kTwoPi = 6.283185307179586;

// Members of config.json with errors that name the file.
class Fields {
 public:
  Fields(const Json& object, std::string where) : object_(object), where_(std::move(where)) {}

  std::string name(const char* field) const { return where_ + ": " + field; }
  const Json* find(const char* field) const { return object_.find(field); }

  const Json& need(const char* field) const {
    const Json* value = find(field);
    if (value == nullptr) fail(where_, ": ", field, " is missing");
    return *value;
  }

  int64_t size(const char* field) const {
    const int64_t value = need(field).integer(name(field));
    if (value < 1) fail(name(field), ": expected at least 1, got ", value);
    return value;
  }
  int64_t size(const char* field, int64_t otherwise) const { return find(field) == nullptr ? otherwise : size(field); }
  double number(const char* field) const { return need(field).number(name(field)); }
  double number(const char* field, double otherwise) const {
    return find(field) == nullptr ? otherwise : number(field);
  }
  std::string text(const char* field, const std::string& otherwise) const {
    const Json* value = find(field);
    return value == nullptr ? otherwise : value->string(name(field));
  }
  bool flag(const char* field) const {
    const Json* value = find(field);
    return value != nullptr && value->boolean(name(field));
  }

 private:
  const Json& object_;
  std::string where_;
};

// Llama 3.1 stretches long wavelengths by `factor`, leaves short ones alone and blends in between.
double llama3_frequency(double frequency, const Fields& rope) {
  const double factor = rope.number("factor");
  const double low = rope.number("low_freq_factor");
  const double high = rope.number("high_freq_factor");
  const double turns = rope.number("original_max_position_embeddings") * frequency / kTwoPi;
  if (turns < low) return frequency / factor;
  if (turns > high) return frequency;
  const double blend = (turns - low) / (high - low);
  return (1 - blend) * frequency / factor + blend * frequency;
}

// transformers 5 writes rope_parameters; earlier versions rope_theta and, where positions are scaled, rope_scaling.
std::vector<double> rotary_frequencies(const Fields& config, int64_t head_dim) {
  const Json none;
  const Json* parameters = config.find("rope_parameters");
  if (parameters == nullptr) parameters = config.find("rope_scaling");
  const Fields rope(parameters == nullptr ? none : *parameters, config.name("rope_parameters"));
  const std::string type = rope.text("rope_type", rope.text("type", "default"));
  const double theta = rope.number("rope_theta", config.number("rope_theta", 10000.0));
  if (type != "default" && type != "linear" && type != "llama3") {
    fail(rope.name("rope_type"), ": \"", type, "\" is not supported; expected default, linear or llama3");
  }
  std::vector<double> frequencies(static_cast<size_t>(head_dim / 2));
  for (size_t i = 0; i < frequencies.size(); ++i) {
    double& frequency = frequencies[i];
    frequency = std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim));
    if (type == "linear") frequency /= rope.number("factor");
    if (type == "llama3") frequency = llama3_frequency(frequency, rope);
  }
  return frequencies;
}

void refuse_what_differs(const Fields& config) {
  const std::string type = config.text("model_type", "(none)");
  if (type != "llama") {
    fail(config.name("model_type"), ": \"", type, "\" is not supported; this example trains \"llama\" models");
  }
  const std::string activation = config.text("hidden_act", "silu");
  if (activation != "silu") fail(config.name("hidden_act"), ": expected \"silu\", got \"", activation, "\"");
  for (const char* bias : {"attention_bias", "mlp_bias"}) {
    if (config.flag(bias)) fail(config.name(bias), ": projections with biases are not supported");
  }
  if (config.number("attention_dropout", 0) != 0) fail(config.name("attention_dropout"), ": expected 0");
  if (config.find("quantization_config") != nullptr) {
    fail(config.name("quantization_config"), ": quantised weights are not supported; convert the model to bfloat16");
  }
}

Tensor to_device(Backend& backend, const StoredTensor& stored) {
  Tensor tensor =
      stored.shape.size() == 1 ? backend.make({stored.shape[0]}) : backend.make({stored.shape[0], stored.shape[1]});
  if (stored.dtype == backend.dtype()) {
    backend.upload(tensor, stored.data);
  } else {
    backend.upload_floats(tensor, stored.floats().data());
  }
  return tensor;
}

// [context, D] with cosines in the first half of every row and sines in the second.
Tensor rotary_table(Backend& backend, const Config& config, int64_t context) {
  const size_t half = config.frequencies.size();
  std::vector<float> values;
  values.reserve(static_cast<size_t>(context) * 2 * half);
  for (int64_t position = 0; position < context; ++position) {
    // The angle is rounded to float before its cosine, as in transformers: at position 100,000 the rounding is visible.
    const auto angle = [&](size_t i) {
      return static_cast<float>(position) * static_cast<float>(config.frequencies[i]);
    };
    for (size_t i = 0; i < half; ++i) values.push_back(std::cos(angle(i)));
    for (size_t i = 0; i < half; ++i) values.push_back(std::sin(angle(i)));
  }
  Tensor table = backend.make({context, config.head_dim}, LEMO_F32);
  backend.upload(table, values.data());
  return table;
}

}  // namespace

Config Config::read(const std::string& folder) {
  const std::string path = folder + "/config.json";
  if (!std::filesystem::is_directory(folder)) fail("--model: ", folder, " is not a folder");
  const Json document = Json::read(path);
  const Fields fields(document, path);
  refuse_what_differs(fields);
  Config config;
  config.hidden = fields.size("hidden_size");
  config.intermediate = fields.size("intermediate_size");
  config.layers = fields.size("num_hidden_layers");
  config.query_heads = fields.size("num_attention_heads");
  config.key_heads = fields.size("num_key_value_heads", config.query_heads);
  config.head_dim = fields.size("head_dim", config.hidden / config.query_heads);
  config.vocabulary = fields.size("vocab_size");
  config.max_positions = fields.size("max_position_embeddings", 2048);
  config.norm_eps = static_cast<float>(fields.number("rms_norm_eps", 1e-6));
  config.tied_head = fields.flag("tie_word_embeddings");
  if (config.query_heads % config.key_heads != 0) {
    fail(path, ": ", config.key_heads, " key heads do not divide ", config.query_heads, " query heads");
  }
  if (config.head_dim % 2 != 0) fail(path, ": head_dim must be even for rotary positions, got ", config.head_dim);
  config.frequencies = rotary_frequencies(fields, config.head_dim);
  return config;
}

Model Model::load(Backend& backend, const std::string& folder, int64_t context) {
  Model model;
  model.config = Config::read(folder);
  const Config& c = model.config;
  const Safetensors file = Safetensors::open_folder(folder);
  const auto load = [&](const std::string& name, const std::vector<int64_t>& shape) {
    return to_device(backend, file.get(name, shape));
  };
  model.embedding = load("model.embed_tokens.weight", {c.vocabulary, c.hidden});
  for (int64_t i = 0; i < c.layers; ++i) {
    const std::string prefix = "model.layers." + std::to_string(i) + ".";
    const auto linear = [&](const std::string& name, int64_t out, int64_t in) {
      return Linear{prefix + name, load(prefix + name + ".weight", {out, in}), {}};
    };
    LayerWeights layer;
    layer.input_norm = load(prefix + "input_layernorm.weight", {c.hidden});
    layer.q = linear("self_attn.q_proj", c.query_heads * c.head_dim, c.hidden);
    layer.k = linear("self_attn.k_proj", c.key_heads * c.head_dim, c.hidden);
    layer.v = linear("self_attn.v_proj", c.key_heads * c.head_dim, c.hidden);
    layer.o = linear("self_attn.o_proj", c.hidden, c.query_heads * c.head_dim);
    layer.post_norm = load(prefix + "post_attention_layernorm.weight", {c.hidden});
    layer.gate = linear("mlp.gate_proj", c.intermediate, c.hidden);
    layer.up = linear("mlp.up_proj", c.intermediate, c.hidden);
    layer.down = linear("mlp.down_proj", c.hidden, c.intermediate);
    model.layers.push_back(std::move(layer));
  }
  model.final_norm = load("model.norm.weight", {c.hidden});
  model.head = c.tied_head ? model.embedding : load("lm_head.weight", {c.vocabulary, c.hidden});
  model.angles = rotary_table(backend, c, context);
  return model;
}

}  // namespace trainer
