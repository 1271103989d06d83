#include "ref/ops.h"

namespace lemo::ref {
void gather(const lemo_exec&, const lemo_gather_args&) { throw Error(LEMO_UNSUPPORTED, "gather: not built yet"); }
void scatter_add(const lemo_exec&, const lemo_scatter_add_args&) {
  throw Error(LEMO_UNSUPPORTED, "scatter_add: not built yet");
}
void gather_norm(const lemo_exec&, const lemo_gather_norm_args&) {
  throw Error(LEMO_UNSUPPORTED, "gather_norm: not built yet");
}
void gather_norm_backward(const lemo_exec&, const lemo_gather_norm_backward_args&) {
  throw Error(LEMO_UNSUPPORTED, "gather_norm_backward: not built yet");
}
uint64_t gather_norm_backward_workspace(const lemo_exec&, const lemo_gather_norm_backward_args&) { return 0; }
}  // namespace lemo::ref
