#include "ref/ops.h"

namespace lemo::ref {
void select(const lemo_exec&, const lemo_select_args&) { throw Error(LEMO_UNSUPPORTED, "select: not built yet"); }
uint64_t select_workspace(const lemo_exec&, const lemo_select_args&) { return 0; }
}  // namespace lemo::ref
