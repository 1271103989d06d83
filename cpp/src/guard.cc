#include "src/guard.h"

#include "src/version.h"

namespace lemo {
namespace {
thread_local std::string last_error;
}

void set_last_error(const char* operation, const char* message) noexcept {
  try {
    last_error = std::string(operation) + ": " + message;
  } catch (...) {
    last_error.clear();
  }
}

void clear_last_error() noexcept { last_error.clear(); }

}  // namespace lemo

extern "C" {

const char* lemo_last_error(void) { return lemo::last_error.c_str(); }

const char* lemo_status_string(lemo_status status) {
  switch (status) {
    case LEMO_OK:
      return "ok";
    case LEMO_INVALID_ARGUMENT:
      return "invalid argument";
    case LEMO_UNSUPPORTED:
      return "unsupported";
    case LEMO_WORKSPACE_TOO_SMALL:
      return "workspace too small";
    case LEMO_NUMERICAL:
      return "numerical error";
    case LEMO_BACKEND_ERROR:
      return "backend error";
    case LEMO_INTERNAL_ERROR:
      return "internal error";
    case LEMO_CANCELLED:
      return "cancelled";
  }
  return "unknown status";
}

const char* lemo_version(void) { return lemo::kVersion; }
}
