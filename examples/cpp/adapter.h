// The LoRA matrices: master copies in float32 on the host, AdamW on them, and PEFT's folder format.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model.h"

namespace trainer {

struct AdamW {
  float learning_rate = 1e-3f;
  float beta1 = 0.9f;
  float beta2 = 0.999f;
  float epsilon = 1e-8f;
  float weight_decay = 0.0f;  // decoupled from the gradient
};

// All LoRA matrices of a model. They are few (some 7 million numbers for an 8B model at rank 8), so the update runs on
// the host, in float32 and the same on both devices; the device holds copies in its own dtype.
class Adapter {
 public:
  struct Options {
    int64_t rank = 8;
    double alpha = 16;
    std::vector<std::string> targets = {"q_proj", "k_proj", "v_proj", "o_proj"};
    uint64_t seed = 0;
    std::string base_model;  // recorded in adapter_config.json
  };

  // A fresh adapter: A uniform in +-1/sqrt(in), B zero, so that training starts from the model as it is.
  static Adapter create(Backend& backend, Model& model, const Options& options);

  // An adapter that PEFT or this program saved. Rank, alpha and targets are the folder's.
  static Adapter load(Backend& backend, Model& model, const std::string& folder, const std::string& base_model);

  void zero_gradients();

  // Reads the gradients from the device and updates the matrices, there and here. Returns the gradients' norm.
  double step(const AdamW& settings);

  // Writes adapter_model.safetensors and adapter_config.json. The folder appears complete or not at all.
  void save(const std::string& folder) const;

  // Every matrix's gradient, under the name that PEFT gives the matrix.
  struct Gradient {
    std::string name;
    std::vector<int64_t> shape;
    std::vector<float> values;
  };
  std::vector<Gradient> gradients() const;

 private:
  struct Matrix {
    std::string name;  // "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    Tensor device;
    Tensor gradient;
    std::vector<float> value, mean, square;  // of AdamW: running averages of the gradient and its square
  };

  Adapter(Backend& backend, Options options) : backend_(backend), options_(std::move(options)) {}

  // Gives the targets of the model their matrices, still without values.
  void attach(Model& model);
  void upload();

  Backend& backend_;
  Options options_;
  std::vector<Matrix> matrices_;
  int64_t steps_ = 0;
};

}  // namespace trainer
