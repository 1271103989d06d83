#include "ref/ops.h"

namespace lemo::ref {
void linear_cross_entropy(const lemo_exec&, const lemo_linear_cross_entropy_args&) {
  throw Error(LEMO_UNSUPPORTED, "linear_cross_entropy: not built yet");
}
uint64_t linear_cross_entropy_workspace(const lemo_exec&, const lemo_linear_cross_entropy_args&) { return 0; }
}  // namespace lemo::ref
