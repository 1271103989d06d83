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

#define LEMO_ENTRY(op) polled<ref::op>,
#define LEMO_ENTRY_WITH_WORKSPACE(op) polled<ref::op>, ref::op##_workspace,
const Backend& cpu_backend() {
  static const Backend backend = {"cpu", [] { return true; }, LEMO_OPERATIONS(LEMO_ENTRY, LEMO_ENTRY_WITH_WORKSPACE)};
  return backend;
}

}  // namespace lemo
