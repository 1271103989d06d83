#include "src/backend.h"

#include "ref/ops.h"
#include "ref/parallel.h"

namespace lemo {
namespace {

// Short operations end before exec.cancel is first called.
template <auto kFunction, class Args>
void polled(const lemo_exec& exec, const Args& args) {
  ref::begin_polling();
  kFunction(exec, args);
}

}  // namespace

const Backend& cpu_backend() {
  static const Backend backend = {
      "cpu",
      [] { return true; },
      polled<ref::select>,
      polled<ref::scores>,
      polled<ref::predict>,
      polled<ref::gather>,
      polled<ref::scatter_add>,
      polled<ref::gather_norm>,
      polled<ref::gather_norm_backward>,
      polled<ref::attention_forward>,
      polled<ref::attention_backward>,
      polled<ref::linear_cross_entropy>,
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
