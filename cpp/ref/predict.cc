#include "ref/ops.h"

namespace lemo::ref {
void predict(const lemo_exec&, const lemo_predict_args&) { throw Error(LEMO_UNSUPPORTED, "predict: not built yet"); }
uint64_t predict_workspace(const lemo_exec&, const lemo_predict_args&) { return 0; }
}  // namespace lemo::ref
