#include "ref/ops.h"

namespace lemo::ref {
void scores(const lemo_exec&, const lemo_scores_args&) { throw Error(LEMO_UNSUPPORTED, "scores: not built yet"); }
uint64_t scores_workspace(const lemo_exec&, const lemo_scores_args&) { return 0; }
uint64_t scores_workspace(const lemo_exec&, const lemo_scores_args&) { return 0; }

}  // namespace lemo::ref
