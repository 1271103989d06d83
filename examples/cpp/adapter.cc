#include "adapter.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "error.h"
#include "json.h"
#include "safetensors.h"

namespace trainer {
namespace {

constexpr const char* kPrefix = "base_model.model.";  // what PEFT's wrappers put before a module's name
constexpr const char* kWeightsName = "adapter_model.safetensors";
constexpr const char* kConfigName = "adapter_config.json";

std::string last_part(const std::string& name) { return name.substr(name.rfind('.') + 1); }

std::vector<int64_t> shape_of(const Tensor& tensor) { return {tensor.rows(), tensor.columns()}; }

// Makes a rename or a new file within the folder last.
void flush_folder(const std::string& folder) {
  const int number = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (number < 0) return;  // some file systems cannot; their files are flushed all the same
  ::fsync(number);
  ::close(number);
}

// Settings of PEFT that change what an adapter computes and that this example does not have.
void refuse_other_kinds(const Json& config, const std::string& where) {
  const Json* type = config.find("peft_type");
  if (type == nullptr || type->string(where) != "LORA") fail(where, ": peft_type must be LORA");
  for (const char* name : {"use_dora", "use_rslora", "fan_in_fan_out", "lora_bias"}) {
    const Json* value = config.find(name);
    if (value != nullptr && value->boolean(where)) fail(where, ": ", name, " is not supported");
  }
  for (const char* name : {"rank_pattern", "alpha_pattern"}) {
    const Json* value = config.find(name);
    if (value != nullptr && !value->object(where).empty()) fail(where, ": ", name, " is not supported");
  }
}

}  // namespace

Adapter Adapter::create(Backend& backend, Model& model, const Options& options) {
  Adapter adapter(backend, options);
  adapter.attach(model);
  uint64_t index = 0;
  for (Matrix& matrix : adapter.matrices_) {
    const bool is_a = matrix.name.find(".lora_A.") != std::string::npos;
    const double bound = is_a ? 1.0 / std::sqrt(static_cast<double>(matrix.device.columns())) : 0.0;
    for (float& x : matrix.value) {
      x = static_cast<float>(bound * (2.0 * lemo_hash_uniform(options.seed, index++) - 1.0));
    }
  }
  adapter.upload();
  return adapter;
}

Adapter Adapter::load(Backend& backend, Model& model, const std::string& folder, const std::string& base_model) {
  const std::string where = folder + "/" + kConfigName;
  const Json config = Json::read(where);
  refuse_other_kinds(config, where);
  const auto need = [&](const char* name) -> const Json& {
    const Json* value = config.find(name);
    if (value == nullptr) fail(where, ": ", name, " is missing");
    return *value;
  };
  Options options;
  options.rank = need("r").integer(where);
  if (options.rank < 1) fail(where, ": r must be at least 1, got ", options.rank);
  options.alpha = need("lora_alpha").number(where);
  options.base_model = base_model;
  const Json& targets = need("target_modules");
  if (targets.is_string()) fail(where, ": target_modules must be a list of names, not a pattern");
  options.targets.clear();
  for (const Json& target : targets.array(where)) options.targets.push_back(target.string(where));
  Adapter adapter(backend, options);
  adapter.attach(model);
  const Safetensors file = Safetensors::open_file(folder + "/" + kWeightsName);
  if (file.all().size() != adapter.matrices_.size()) {
    fail(folder, "/", kWeightsName, ": holds ", file.all().size(), " tensors; target_modules and the model make ",
         adapter.matrices_.size());
  }
  for (Matrix& matrix : adapter.matrices_) matrix.value = file.get(matrix.name, shape_of(matrix.device)).floats();
  adapter.upload();
  return adapter;
}

void Adapter::attach(Model& model) {
  std::vector<std::string> unknown = options_.targets;
  const auto add = [&](const std::string& name, const Tensor& device, const Tensor& gradient) {
    const auto size = static_cast<size_t>(device.count());
    const std::vector<float> zeros(size);
    matrices_.push_back({kPrefix + name, device, gradient, zeros, zeros, zeros});
  };
  for (LayerWeights& layer : model.layers) {
    for (Linear* linear : layer.linears()) {
      const std::string target = last_part(linear->name);
      if (std::count(options_.targets.begin(), options_.targets.end(), target) == 0) continue;
      unknown.erase(std::remove(unknown.begin(), unknown.end(), target), unknown.end());
      const int64_t out = linear->weight.rows();
      const int64_t in = linear->weight.columns();
      const int64_t r = options_.rank;
      Lora& lora = linear->lora;
      lora.scale = static_cast<float>(options_.alpha / static_cast<double>(r));
      lora.a = backend_.make({r, in});
      lora.b = backend_.make({out, r});
      lora.gradient_a = backend_.make({r, in}, LEMO_F32);
      lora.gradient_b = backend_.make({out, r}, LEMO_F32);
      add(linear->name + ".lora_A.weight", lora.a, lora.gradient_a);
      add(linear->name + ".lora_B.weight", lora.b, lora.gradient_b);
    }
  }
  if (!unknown.empty()) fail("LoRA target ", unknown[0], ": the model has no projection of this name");
  if (matrices_.empty()) fail("LoRA targets: expected at least one projection");
}

void Adapter::upload() {
  for (const Matrix& matrix : matrices_) backend_.upload_floats(matrix.device, matrix.value.data());
}

void Adapter::zero_gradients() {
  for (const Matrix& matrix : matrices_) backend_.zero(matrix.gradient);
}

double Adapter::step(const AdamW& settings) {
  ++steps_;
  // The running averages start at zero; dividing by these takes the bias out.
  const float correction1 = 1.0f - std::pow(settings.beta1, static_cast<float>(steps_));
  const float correction2 = 1.0f - std::pow(settings.beta2, static_cast<float>(steps_));
  double squares = 0;
  for (Matrix& matrix : matrices_) {
    const std::vector<float> gradient = backend_.download_floats(matrix.gradient);
    for (size_t i = 0; i < gradient.size(); ++i) {
      const float g = gradient[i];
      squares += static_cast<double>(g) * g;
      float& mean = matrix.mean[i];
      float& square = matrix.square[i];
      mean = settings.beta1 * mean + (1.0f - settings.beta1) * g;
      square = settings.beta2 * square + (1.0f - settings.beta2) * g * g;
      const float direction = mean / correction1 / (std::sqrt(square / correction2) + settings.epsilon);
      matrix.value[i] -= settings.learning_rate * (direction + settings.weight_decay * matrix.value[i]);
    }
  }
  upload();
  return std::sqrt(squares);
}

std::vector<Adapter::Gradient> Adapter::gradients() const {
  std::vector<Gradient> all;
  for (const Matrix& matrix : matrices_) {
    all.push_back({matrix.name, shape_of(matrix.device), backend_.download_floats(matrix.gradient)});
  }
  return all;
}

void Adapter::save(const std::string& folder) const {
  namespace fs = std::filesystem;
  // Written under another name next to it and renamed: the folder is complete or absent.
  const fs::path target = fs::absolute(folder).lexically_normal();
  const fs::path final_name = target.has_filename() ? target : target.parent_path();
  const fs::path temporary =
      final_name.parent_path() / ("." + final_name.filename().string() + ".writing-" + std::to_string(::getpid()));
  try {
    fs::create_directories(temporary);
    std::vector<NamedTensor> tensors;
    for (const Matrix& matrix : matrices_) {
      tensors.push_back({matrix.name, LEMO_F32, shape_of(matrix.device), matrix.value.data()});
    }
    write_safetensors((temporary / kWeightsName).string(), tensors);

    std::ostringstream config;
    config.precision(17);  // alpha is read back as the number it was
    config << "{\n  \"peft_type\": \"LORA\",\n  \"task_type\": \"CAUSAL_LM\",\n"
           << "  \"base_model_name_or_path\": " << json_quoted(options_.base_model) << ",\n"
           << "  \"r\": " << options_.rank << ",\n  \"lora_alpha\": " << options_.alpha << ",\n"
           << "  \"lora_dropout\": 0.0,\n  \"bias\": \"none\",\n  \"inference_mode\": true,\n  \"target_modules\": [";
    for (size_t i = 0; i < options_.targets.size(); ++i) {
      config << (i == 0 ? "" : ", ") << json_quoted(options_.targets[i]);
    }
    config << "]\n}\n";
    const std::string text = config.str();
    write_file((temporary / kConfigName).string(), {{text.data(), text.size()}});
    flush_folder(temporary.string());
    fs::rename(temporary, final_name);
    flush_folder(final_name.parent_path().string());
  } catch (const std::exception& error) {
    std::error_code ignored;
    fs::remove_all(temporary, ignored);
    fail("--out: the adapter could not be saved: ", error.what());
  }
}

}  // namespace trainer
