// A Llama-style model: its sizes, and its frozen weights on the device.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "backend.h"
#include "safetensors.h"

namespace trainer {

// config.json, reduced to what the computation depends on.
struct Config {
  int64_t hidden;        // d
  int64_t intermediate;  // f
  int64_t layers;
  int64_t query_heads;  // Hq
  int64_t key_heads;    // Hk, divides Hq
  int64_t head_dim;     // D
  int64_t vocabulary;   // V
  int64_t max_positions;
  float norm_eps;
  bool tied_head;
  std::vector<double> frequencies;  // [D / 2] of the rotary positions, scaling applied

  // Throws Error for whatever this example does not compute exactly: a wrong number is worse than none.
  static Config read(const std::string& folder);
};

// Low-rank update of a projection: y = x W^T + scale (x A^T) B^T.
struct Lora {
  Tensor a;           // [r, in], the backend's dtype: what the products read
  Tensor b;           // [out, r]
  Tensor gradient_a;  // float32 [r, in]
  Tensor gradient_b;  // float32 [out, r]
  float scale = 0;
};

struct Linear {
  std::string name;  // "model.layers.0.self_attn.q_proj"
  Tensor weight;     // [out, in], frozen
  Lora lora;         // lora.a is empty where the projection has no adapter

  bool adapted() const { return static_cast<bool>(lora.a); }
};

struct LayerWeights {
  Tensor input_norm;  // [d]
  Linear q, k, v, o;  // [Hq D, d], [Hk D, d], [Hk D, d], [d, Hq D]
  Tensor post_norm;   // [d]
  Linear gate, up;    // [f, d]
  Linear down;        // [d, f]

  std::array<Linear*, 7> linears() { return {&q, &k, &v, &o, &gate, &up, &down}; }
};

struct Model {
  Config config;
  Tensor embedding;  // [V, d]
  std::vector<LayerWeights> layers;
  Tensor final_norm;  // [d]
  Tensor head;        // [V, d]; the embedding itself where they are tied
  Tensor angles;      // float32 [context, D]: cosines and sines, see Backend::rotate

  // context: positions the rotary table has to cover.
  static Model load(Backend& backend, const std::string& folder, int64_t context);
};

}  // namespace trainer
