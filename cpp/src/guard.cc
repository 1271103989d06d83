#include "src/guard.h"

#include <cstdio>

#include "src/version.h"

namespace lemo {
namespace {
// Of a fixed size: a pointer to it stays readable as long as the thread lives, whatever is called in between, and
// running out of memory has a message too. Longer messages are cut.
thread_local char last_error[2048];
}  // namespace

void set_last_error(const char* operation, const char* message) noexcept {
  std::snprintf(last_error, sizeof(last_error), "%s: %s", operation, message);
}

void clear_last_error() noexcept { last_error[0] = '\0'; }

}  // namespace lemo

extern "C" {

const char* lemo_last_error(void) { return lemo::last_error; }

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
