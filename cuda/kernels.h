// The operations of the CUDA backend, one function per entry of lemo::Backend. Arguments arrive validated.
#pragma once

#include "src/backend.h"

namespace lemo::cuda {

LEMO_DECLARE_OPERATIONS

}  // namespace lemo::cuda
