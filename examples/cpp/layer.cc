#include "layer.h"

#include <cmath>

namespace trainer {
namespace {

// M kept rows; d hidden, f intermediate size; Hq and Hk heads of D.
struct Activations {
  Tensor h;        // [M, d] norm of the input
  Tensor q, k, v;  // [M, Hq D], [M, Hk D], [M, Hk D], rotary positions applied to q and k
  Tensor out;      // [M, Hq D] attention's output
  Tensor lse;      // float32 [Hq, M]
  Tensor x2;       // [M, d] input + attention
  Tensor h2;       // [M, d] norm of x2
  Tensor gate;     // [M, f]
  Tensor up;       // [M, f]
  Tensor inner;    // [M, f] silu(gate) * up
};

lemo_gather_norm_args norm_args(const Config& config, const Tensor& weight) {
  auto args = lemo::make<lemo_gather_norm_args>();
  args.weight = weight;
  args.norm = LEMO_NORM_RMS;
  args.eps = config.norm_eps;
  return args;
}

float attention_scale(const Config& config) { return 1.0f / std::sqrt(static_cast<float>(config.head_dim)); }

// The layer's operations for one list of rows. A forward pass and the recomputation before a backward pass differ only
// in where the input comes from.
class KeptLayer {
 public:
  KeptLayer(Backend& backend, const Model& model, const LayerWeights& layer, const Kept& kept)
      : backend_(backend), model_(model), config_(model.config), layer_(layer), kept_(kept), m_(kept.count) {}

  // Fills h. Gathers from the residual stream x [T, d] and returns the kept rows of it, [M, d].
  Tensor enter(const Tensor& x, Activations& a) const {
    Tensor input = rows(config_.hidden);
    a.h = rows(config_.hidden);
    auto args = norm_args(config_, layer_.input_norm);
    args.x = x;
    args.rows = kept_.rows();
    args.packed = input;
    args.y = a.h;
    backend_.run(args);
    return input;
  }

  // The same where the kept rows are at hand.
  void enter_again(const Tensor& input, Activations& a) const {
    a.h = rows(config_.hidden);
    norm_forward(backend_, config_, layer_.input_norm, input, a.h);
  }

  // From h to the input of the last projection.
  void compute(const Tensor& input, Activations& a) const {
    attention(a);

    const Tensor attended = rows(config_.hidden);
    linear_forward(backend_, layer_.o, a.out, attended);
    a.x2 = rows(config_.hidden);
    a.h2 = rows(config_.hidden);
    auto norm = norm_args(config_, layer_.post_norm);
    norm.x = attended;
    norm.residual = input;
    norm.packed = a.x2;
    norm.y = a.h2;
    backend_.run(norm);

    a.gate = rows(config_.intermediate);
    a.up = rows(config_.intermediate);
    a.inner = rows(config_.intermediate);
    linear_forward(backend_, layer_.gate, a.h2, a.gate);
    linear_forward(backend_, layer_.up, a.h2, a.up);
    backend_.swiglu(a.inner, a.gate, a.up);
  }

  // x[rows] = x2 + down(inner)
  void leave(const Activations& a, const Tensor& x) const {
    const Tensor mlp = rows(config_.hidden);
    linear_forward(backend_, layer_.down, a.inner, mlp);
    auto scatter = lemo::make<lemo_scatter_add_args>();
    scatter.x = x;
    scatter.rows = kept_.rows();
    scatter.y = mlp;
    scatter.base = a.x2;
    backend_.run(scatter);
  }

  // dx [T, d]: from the gradient at the layer's output to that at its input. Uses up the activations.
  void backward(const Tensor& input, Activations& a, const Tensor& dx) const {
    const Tensor dy = rows(config_.hidden);  // at x2 + mlp: the gradient of both terms
    auto gather = lemo::make<lemo_gather_args>();
    gather.x = dx;
    gather.rows = kept_.rows();
    gather.out = dy;
    backend_.run(gather);

    const Tensor dx2 = mlp_backward(a, dy);
    const Tensor dh = attention_backward(a, dx2);

    // Overwrites the kept rows of dx; those of eliminated tokens pass unchanged, as their values did.
    auto norm = norm_backward_args(layer_.input_norm, input, dh, dx2, dx);
    norm.rows = kept_.rows();
    backend_.run(norm);
  }

 private:
  Tensor rows(int64_t columns) const { return backend_.make({m_, columns}); }
  lemo_tensor query_heads(const Tensor& x) const { return x.as({m_, config_.query_heads, config_.head_dim}); }
  lemo_tensor key_heads(const Tensor& x) const { return x.as({m_, config_.key_heads, config_.head_dim}); }

  // Causal attention among the kept rows, at the positions they have in the whole window.
  void attention(Activations& a) const {
    a.q = rows(config_.query_heads * config_.head_dim);
    a.k = rows(config_.key_heads * config_.head_dim);
    a.v = rows(config_.key_heads * config_.head_dim);
    a.out = rows(config_.query_heads * config_.head_dim);
    a.lse = backend_.make({config_.query_heads, m_}, LEMO_F32);
    linear_forward(backend_, layer_.q, a.h, a.q);
    linear_forward(backend_, layer_.k, a.h, a.k);
    linear_forward(backend_, layer_.v, a.h, a.v);
    rotate(a.q, a.k, 1.0f);
    auto args = lemo::make<lemo_attention_forward_args>();
    args.q = query_heads(a.q);
    args.k = key_heads(a.k);
    args.v = key_heads(a.v);
    args.cu_seqlens = kept_.cu_seqlens;
    args.max_seqlen = m_;
    args.scale = attention_scale(config_);
    args.out = query_heads(a.out);
    args.lse = a.lse;
    backend_.run(args);
  }

  void rotate(const Tensor& q, const Tensor& k, float direction) const {
    backend_.rotate(query_heads(q), model_.angles, kept_.rows(), direction);
    backend_.rotate(key_heads(k), model_.angles, kept_.rows(), direction);
  }

  // dx[rows] = the gradient of the norm at s, plus `extra`, the gradient that reaches s past the norm.
  lemo_gather_norm_backward_args norm_backward_args(const Tensor& weight, const Tensor& s, const Tensor& dy,
                                                    const Tensor& extra, const Tensor& dx) const {
    auto args = lemo::make<lemo_gather_norm_backward_args>();
    args.dy = dy;
    args.s = s;
    args.weight = weight;
    args.ds_extra = extra;
    args.norm = LEMO_NORM_RMS;
    args.eps = config_.norm_eps;
    args.dx = dx;
    return args;
  }

  // From dy at the layer's output to the gradient at x2, [M, d].
  Tensor mlp_backward(Activations& a, const Tensor& dy) const {
    const Tensor dinner = rows(config_.intermediate);
    linear_backward(backend_, layer_.down, a.inner, dy, dinner, false);
    backend_.swiglu_backward(a.gate, a.up, dinner);  // a.gate and a.up are gradients from here on
    const Tensor dh2 = rows(config_.hidden);
    linear_backward(backend_, layer_.gate, a.h2, a.gate, dh2, false);
    linear_backward(backend_, layer_.up, a.h2, a.up, dh2, true);
    const Tensor dx2 = rows(config_.hidden);
    backend_.run(norm_backward_args(layer_.post_norm, a.x2, dh2, dy, dx2));
    return dx2;
  }

  // From da at attention's contribution to the gradient at h, [M, d].
  Tensor attention_backward(const Activations& a, const Tensor& da) const {
    const Tensor dout = rows(config_.query_heads * config_.head_dim);
    linear_backward(backend_, layer_.o, a.out, da, dout, false);
    const Tensor dq = rows(config_.query_heads * config_.head_dim);
    const Tensor dk = rows(config_.key_heads * config_.head_dim);
    const Tensor dv = rows(config_.key_heads * config_.head_dim);
    auto args = lemo::make<lemo_attention_backward_args>();
    args.dout = query_heads(dout);
    args.q = query_heads(a.q);
    args.k = key_heads(a.k);
    args.v = key_heads(a.v);
    args.out = query_heads(a.out);
    args.lse = a.lse;
    args.cu_seqlens = kept_.cu_seqlens;
    args.max_seqlen = m_;
    args.scale = attention_scale(config_);
    args.dq = query_heads(dq);
    args.dk = key_heads(dk);
    args.dv = key_heads(dv);
    backend_.run(args);
    rotate(dq, dk, -1.0f);
    const Tensor dh = rows(config_.hidden);
    linear_backward(backend_, layer_.q, a.h, dq, dh, false);
    linear_backward(backend_, layer_.k, a.h, dk, dh, true);
    linear_backward(backend_, layer_.v, a.h, dv, dh, true);
    return dh;
  }

  Backend& backend_;
  const Model& model_;
  const Config& config_;
  const LayerWeights& layer_;
  const Kept& kept_;
  int64_t m_;
};

}  // namespace

void linear_forward(Backend& backend, const Linear& linear, const Tensor& x, const Tensor& y) {
  backend.matmul(y, 1.0f, x, Op::kPlain, linear.weight, Op::kTransposed, 0.0f);
  if (!linear.adapted()) return;
  const Lora& lora = linear.lora;
  const Tensor t = backend.make({x.rows(), lora.a.rows()});
  backend.matmul(t, 1.0f, x, Op::kPlain, lora.a, Op::kTransposed, 0.0f);
  backend.matmul(y, lora.scale, t, Op::kPlain, lora.b, Op::kTransposed, 1.0f);
}

void linear_backward(Backend& backend, const Linear& linear, const Tensor& x, const Tensor& dy, const Tensor& dx,
                     bool accumulate) {
  backend.matmul(dx, 1.0f, dy, Op::kPlain, linear.weight, Op::kPlain, accumulate ? 1.0f : 0.0f);
  if (!linear.adapted()) return;
  const Lora& lora = linear.lora;
  const Tensor t = backend.make({x.rows(), lora.a.rows()});   // x A^T again: cheaper than keeping it
  const Tensor dt = backend.make({x.rows(), lora.a.rows()});  // its gradient
  backend.matmul(t, 1.0f, x, Op::kPlain, lora.a, Op::kTransposed, 0.0f);
  backend.matmul(dt, lora.scale, dy, Op::kPlain, lora.b, Op::kPlain, 0.0f);
  backend.matmul(dx, 1.0f, dt, Op::kPlain, lora.a, Op::kPlain, 1.0f);
  backend.matmul(lora.gradient_a, 1.0f, dt, Op::kTransposed, x, Op::kPlain, 1.0f);
  backend.matmul(lora.gradient_b, lora.scale, dy, Op::kTransposed, t, Op::kPlain, 1.0f);
}

Saved layer_forward(Backend& backend, const Model& model, const LayerWeights& layer, const Tensor& x,
                    std::shared_ptr<const Kept> kept, bool save) {
  const KeptLayer work(backend, model, layer, *kept);
  Activations a;
  Tensor input = work.enter(x, a);
  work.compute(input, a);
  work.leave(a, x);
  return save ? Saved{std::move(kept), std::move(input)} : Saved{};
}

void layer_backward(Backend& backend, const Model& model, const LayerWeights& layer, const Saved& saved,
                    const Tensor& dx) {
  const KeptLayer work(backend, model, layer, *saved.kept);
  Activations a;
  work.enter_again(saved.input, a);
  work.compute(saved.input, a);
  work.backward(saved.input, a, dx);
}

void norm_forward(Backend& backend, const Config& config, const Tensor& weight, const Tensor& x, const Tensor& y) {
  auto args = norm_args(config, weight);
  args.x = x;
  args.y = y;
  backend.run(args);
}

}  // namespace trainer
