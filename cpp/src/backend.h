// One table of functions per backend. Arguments arrive validated: shapes, dtypes, strides and alignment agree, and the
// workspace is large enough. A tensor's data is NULL if it is absent and only then: an empty tensor has an address.
// Sizes of one tensor fit PTRDIFF_MAX; products of several need not. A backend checks only what it alone knows, which
// kernels it has, and throws lemo::Error(LEMO_UNSUPPORTED, ...) before its first write.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "lemo/lemo.h"
#include "lemo/operations.h"

namespace lemo {

class Error : public std::runtime_error {
 public:
  Error(lemo_status status, const std::string& message) : std::runtime_error(message), status(status) {}
  lemo_status status;
};

// Declares every operation of a backend in the current namespace: op(exec, args), and op_workspace(exec, args), which
// returns bytes of workspace from shapes alone (tensor data is not read).
#define LEMO_DECLARE_OPERATION(op) void op(const lemo_exec& exec, const lemo_##op##_args& a);
#define LEMO_DECLARE_OPERATION_WITH_WORKSPACE(op) \
  LEMO_DECLARE_OPERATION(op)                      \
  uint64_t op##_workspace(const lemo_exec& exec, const lemo_##op##_args& a);
#define LEMO_DECLARE_OPERATIONS LEMO_OPERATIONS(LEMO_DECLARE_OPERATION, LEMO_DECLARE_OPERATION_WITH_WORKSPACE)

#define LEMO_ENTRY(op) void (*op)(const lemo_exec&, const lemo_##op##_args&);
#define LEMO_ENTRY_WITH_WORKSPACE(op) \
  LEMO_ENTRY(op)                      \
  uint64_t (*op##_workspace)(const lemo_exec&, const lemo_##op##_args&);
struct Backend {
  const char* name;
  bool (*available)();
  LEMO_OPERATIONS(LEMO_ENTRY, LEMO_ENTRY_WITH_WORKSPACE)
};
#undef LEMO_ENTRY_WITH_WORKSPACE
#undef LEMO_ENTRY

const Backend& cpu_backend();
const Backend& cuda_backend();  // defined only in builds with LEMO_WITH_CUDA

}  // namespace lemo
