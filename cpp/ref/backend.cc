#include "src/backend.h"

#include "ref/ops.h"

namespace lemo {

const Backend& cpu_backend() {
  static const Backend backend = {
      "cpu",
      [] { return true; },
      ref::select,
      ref::scores,
      ref::predict,
      ref::gather,
      ref::scatter_add,
      ref::gather_norm,
      ref::gather_norm_backward,
      ref::attention_forward,
      ref::attention_backward,
      ref::linear_cross_entropy,
      ref::select_workspace,
      ref::scores_workspace,
      ref::predict_workspace,
      ref::gather_norm_backward_workspace,
      ref::attention_forward_workspace,
      ref::attention_backward_workspace,
      ref::linear_cross_entropy_workspace,
  };
  return backend;
}

}  // namespace lemo
