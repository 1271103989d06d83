#include "ref/ops.h"

namespace lemo::ref {
void attention_forward(const lemo_exec&, const lemo_attention_forward_args&) {
  throw Error(LEMO_UNSUPPORTED, "attention_forward: not built yet");
}
uint64_t attention_forward_workspace(const lemo_exec&, const lemo_attention_forward_args&) { return 0; }
void attention_backward(const lemo_exec&, const lemo_attention_backward_args&) {
  throw Error(LEMO_UNSUPPORTED, "attention_backward: not built yet");
}
uint64_t attention_backward_workspace(const lemo_exec&, const lemo_attention_backward_args&) { return 0; }
uint64_t attention_forward_workspace(const lemo_exec&, const lemo_attention_forward_args&) { return 0; }
uint64_t attention_backward_workspace(const lemo_exec&, const lemo_attention_backward_args&) { return 0; }

}  // namespace lemo::ref
