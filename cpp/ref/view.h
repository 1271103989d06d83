// Tensors of the CPU backend as pointers with strides.
#pragma once

#include "lemo/types.h"

namespace lemo::ref {

inline bool present(const lemo_tensor& t) { return t.ndim != 0; }
inline float* floats(const lemo_tensor& t) { return present(t) ? static_cast<float*>(t.data) : nullptr; }
inline int32_t* ints(const lemo_tensor& t) { return present(t) ? static_cast<int32_t*>(t.data) : nullptr; }

// Row i of [rows, n].
inline float* row(const lemo_tensor& t, int64_t i) { return static_cast<float*>(t.data) + i * t.stride[0]; }
// Row i of head h of [rows, heads, n].
inline float* row(const lemo_tensor& t, int64_t i, int64_t h) {
  return static_cast<float*>(t.data) + i * t.stride[0] + h * t.stride[1];
}

}  // namespace lemo::ref
