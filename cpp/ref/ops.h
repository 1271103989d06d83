// The operations of the CPU backend: float32 throughout, results independent of the number of threads.
#pragma once

#include "src/backend.h"

namespace lemo::ref {

LEMO_DECLARE_OPERATIONS

}  // namespace lemo::ref
