// One table of functions per backend. Arguments arrive validated: shapes, dtypes, strides and alignment agree, and the
// workspace is large enough. A tensor's data is NULL where it is absent and nowhere else: an empty tensor has an
// address. Sizes of one tensor fit PTRDIFF_MAX; products of several do not have to. A backend checks only what it alone
// knows (which kernels it has), in `supports`-style throws of lemo::Error(LEMO_UNSUPPORTED, ...) before its first
// write.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "lemo/lemo.h"

namespace lemo {

class Error : public std::runtime_error {
 public:
  Error(lemo_status status, const std::string& message) : std::runtime_error(message), status(status) {}
  lemo_status status;
};

struct Backend {
  const char* name;
  bool (*available)();

  void (*select)(const lemo_exec&, const lemo_select_args&);
  void (*scores)(const lemo_exec&, const lemo_scores_args&);
  void (*predict)(const lemo_exec&, const lemo_predict_args&);
  void (*gather)(const lemo_exec&, const lemo_gather_args&);
  void (*scatter_add)(const lemo_exec&, const lemo_scatter_add_args&);
  void (*gather_norm)(const lemo_exec&, const lemo_gather_norm_args&);
  void (*gather_norm_backward)(const lemo_exec&, const lemo_gather_norm_backward_args&);
  void (*attention_forward)(const lemo_exec&, const lemo_attention_forward_args&);
  void (*attention_backward)(const lemo_exec&, const lemo_attention_backward_args&);
  void (*linear_cross_entropy)(const lemo_exec&, const lemo_linear_cross_entropy_args&);

  // Bytes of workspace, from shapes alone (tensor data is not read).
  uint64_t (*select_workspace)(const lemo_exec&, const lemo_select_args&);
  uint64_t (*scores_workspace)(const lemo_exec&, const lemo_scores_args&);
  uint64_t (*predict_workspace)(const lemo_exec&, const lemo_predict_args&);
  uint64_t (*gather_norm_backward_workspace)(const lemo_exec&, const lemo_gather_norm_backward_args&);
  uint64_t (*attention_forward_workspace)(const lemo_exec&, const lemo_attention_forward_args&);
  uint64_t (*attention_backward_workspace)(const lemo_exec&, const lemo_attention_backward_args&);
  uint64_t (*linear_cross_entropy_workspace)(const lemo_exec&, const lemo_linear_cross_entropy_args&);
};

const Backend& cpu_backend();
const Backend& cuda_backend();  // defined only in builds with LEMO_WITH_CUDA

}  // namespace lemo
