#pragma once

#include "lemo/types.h"

#define LEMO_TEXT_(x) #x
#define LEMO_TEXT(x) LEMO_TEXT_(x)

namespace lemo {
constexpr const char* kVersion =
    LEMO_TEXT(LEMO_VERSION_MAJOR) "." LEMO_TEXT(LEMO_VERSION_MINOR) "." LEMO_TEXT(LEMO_VERSION_PATCH);
}
