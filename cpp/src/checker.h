// Checks of single tensors: dtype, shape, strides, extent, alignment. All throw lemo::Error.
#pragma once

#include <algorithm>
#include <array>
#include <initializer_list>
#include <string>
#include <vector>

#include "src/checked.h"
#include "src/validate.h"

namespace lemo {

constexpr int64_t kAny = -1;  // a dimension that may have any size
constexpr int64_t kMaxRows = (int64_t{1} << 31) - 1;

inline const char* dtype_name(int32_t dtype) {
  constexpr std::array<const char*, 6> names = {"float32", "float16", "bfloat16", "int32", "int64", "uint8"};
  return dtype >= 0 && dtype < static_cast<int32_t>(names.size()) ? names[static_cast<size_t>(dtype)] : "unknown dtype";
}

inline int64_t dtype_size(int32_t dtype) {
  constexpr std::array<int64_t, 6> sizes = {4, 2, 2, 4, 8, 1};
  return sizes[static_cast<size_t>(dtype)];
}

inline std::string list(const int64_t* values, int32_t count) {
  std::string text = "[";
  for (int32_t i = 0; i < count; ++i) text += (i > 0 ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

inline std::string describe(const lemo_tensor& t) {
  if (t.ndim == 0) return "no tensor";
  return std::string(dtype_name(t.dtype)) + " " + list(t.shape, std::min(t.ndim, LEMO_MAX_DIMS));
}

[[noreturn]] inline void invalid(const std::string& message) { throw Error(LEMO_INVALID_ARGUMENT, message); }

inline bool present(const lemo_tensor& t) { return t.ndim != 0; }

inline bool empty(const lemo_tensor& t) {
  for (int32_t i = 0; i < t.ndim; ++i) {
    if (t.shape[i] == 0) return true;
  }
  return false;
}

// One dimension of an expected shape: its letter in the header, and its size or kAny.
struct Dim {
  const char* letter;
  int64_t size;
};

enum class Role { kInput, kOutput };

class Checker {
 public:
  Checker(const lemo_exec& exec, Purpose purpose) : exec_(exec), purpose_(purpose) {}

  // A tensor of the computing type: float32 on the CPU, float16 or bfloat16 on CUDA.
  void data(const char* name, const lemo_tensor& t, std::initializer_list<Dim> dims, Role role = Role::kInput) const {
    require(name, t, dims);
    if (t.dtype != LEMO_F32 && t.dtype != LEMO_F16 && t.dtype != LEMO_BF16) {
      invalid(std::string(name) + ": expected " + (on_cpu() ? "float32" : "float16 or bfloat16") + ", got " +
              describe(t));
    }
    if (on_cpu() != (t.dtype == LEMO_F32)) {
      throw Error(LEMO_UNSUPPORTED, std::string(name) + ": the " + (on_cpu() ? "CPU" : "CUDA") + " backend expects " +
                                        (on_cpu() ? "float32" : "float16 or bfloat16") + ", got " + describe(t) +
                                        "; convert the tensor");
    }
    layout(name, t, role);
  }

  void typed(const char* name, const lemo_tensor& t, int32_t dtype, std::initializer_list<Dim> dims,
             Role role = Role::kInput) const {
    require(name, t, dims);
    if (t.dtype != dtype) {
      invalid(std::string(name) + ": expected " + dtype_name(dtype) + " " + expected(dims) + ", got " + describe(t));
    }
    layout(name, t, role);
  }

  // The dtype of an already checked tensor.
  void like(const char* name, const lemo_tensor& t, const char* other_name, const lemo_tensor& other,
            std::initializer_list<Dim> dims, Role role = Role::kInput) const {
    require(name, t, dims);
    if (t.dtype != other.dtype) {
      invalid(std::string(name) + ": expected " + dtype_name(other.dtype) + " " + expected(dims) + " as " + other_name +
              ", got " + describe(t));
    }
    layout(name, t, role);
  }

  // CUDA kernels move rows of `name` 16 bytes at a time; `letter`: of their width in the header. Asked before outputs
  // are looked at, which cannot be aligned either if the width is not a multiple.
  void width(const char* name, const lemo_tensor& t, const char* letter = "d") const {
    const int64_t d = t.shape[t.ndim - 1];
    if (on_cpu() || d % 8 == 0) return;
    throw Error(LEMO_UNSUPPORTED, std::string(name) + ": expected " + letter + " to be a multiple of 8 on CUDA, got " +
                                      std::to_string(d) + "; pad the rows");
  }

  bool on_cpu() const { return exec_.device == LEMO_CPU; }
  bool values() const { return on_cpu() && purpose_ == Purpose::kRun; }

 private:
  static std::string expected(std::initializer_list<Dim> dims) {
    std::string text = "[";
    for (const Dim& dim : dims) {
      if (text.size() > 1) text += ", ";
      text += dim.letter;
      if (dim.size != kAny && std::to_string(dim.size) != dim.letter) text += "=" + std::to_string(dim.size);
    }
    return text + "]";
  }

  static void require(const char* name, const lemo_tensor& t, std::initializer_list<Dim> dims) {
    if (t.ndim < 0 || t.ndim > LEMO_MAX_DIMS) {
      invalid(std::string(name) + ".ndim: expected 0 to " + std::to_string(LEMO_MAX_DIMS) + ", got " +
              std::to_string(t.ndim));
    }
    bool fits = t.ndim == static_cast<int32_t>(dims.size());
    for (int32_t i = 0; fits && i < t.ndim; ++i) {
      const int64_t size = (dims.begin() + i)->size;
      fits = t.shape[i] >= 0 && (size == kAny || size == t.shape[i]);
    }
    if (!fits) invalid(std::string(name) + ": expected shape " + expected(dims) + ", got " + describe(t));
  }

  // Kernels count sizes in int32.
  void check_counts(const char* name, const lemo_tensor& t) const {
    for (int32_t i = 0; !on_cpu() && i < t.ndim; ++i) {
      if (t.shape[i] > kMaxRows) {
        invalid(std::string(name) + ": expected sizes of at most 2^31 - 1 on CUDA, got " + describe(t));
      }
    }
  }

  // Neither the elements nor the memory from the first to the last of them may exceed PTRDIFF_MAX bytes: what follows
  // and the backends multiply sizes and strides of one tensor without further checks. Dimensions of 0 count as 1, since
  // other tensors may share the remaining sizes.
  static void check_extent(const char* name, const lemo_tensor& t) {
    Size elements = 1, span = 1;
    for (int32_t i = 0; i < t.ndim; ++i) {
      elements = elements * std::max<int64_t>(t.shape[i], 1);
      if (t.shape[i] > 1 && !empty(t)) span = span + Size(t.shape[i] - 1) * t.stride[i];
    }
    const int64_t size = dtype_size(t.dtype);
    if ((elements * size).fits() && (span * size).fits()) return;
    invalid(std::string(name) + ": expected a tensor of at most PTRDIFF_MAX bytes, got " + describe(t) +
            " with strides " + list(t.stride, t.ndim));
  }

  static void check_strides(const char* name, const lemo_tensor& t) {
    const int32_t last = t.ndim - 1;
    if (t.shape[last] > 1 && t.stride[last] != 1) {
      invalid(std::string(name) + ": expected the last dimension contiguous, got strides " + list(t.stride, t.ndim) +
              " for shape " + list(t.shape, t.ndim));
    }
    for (int32_t i = 0; i < last; ++i) {
      if (t.shape[i] > 1 && t.stride[i] < 0) {
        invalid(std::string(name) + ": expected strides of at least 0, got " + list(t.stride, t.ndim));
      }
    }
  }

  void layout(const char* name, const lemo_tensor& t, Role role) const {
    if (!empty(t)) check_strides(name, t);
    check_extent(name, t);
    check_counts(name, t);
    if (empty(t)) return;
    const int32_t last = t.ndim - 1;
    if (role == Role::kOutput) no_overlap(name, t);
    if (purpose_ == Purpose::kRun) pointer(name, t);
    if (!on_cpu() && t.ndim > 1) {
      for (int32_t i = 0; i < last; ++i) {
        if (t.shape[i] > 1 && t.stride[i] * dtype_size(t.dtype) % 16 != 0 && is_half(t)) {
          invalid(std::string(name) + ": expected strides that are multiples of 16 bytes on CUDA, got " +
                  list(t.stride, t.ndim) + " for " + describe(t));
        }
      }
    }
  }

  // CUDA kernels move these 16 bytes at a time.
  static bool is_half(const lemo_tensor& t) { return t.dtype == LEMO_F16 || t.dtype == LEMO_BF16; }

  // Dimensions by ascending stride: each must clear the extent of the ones before it.
  static void no_overlap(const char* name, const lemo_tensor& t) {
    std::vector<int32_t> order;
    for (int32_t i = 0; i < t.ndim; ++i) {
      if (t.shape[i] > 1) order.push_back(i);
    }
    std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return t.stride[a] < t.stride[b]; });
    int64_t extent = 1;
    for (const int32_t dim : order) {
      if (t.stride[dim] < extent) {
        invalid(std::string(name) + ": expected an output without overlapping elements, got strides " +
                list(t.stride, t.ndim) + " for shape " + list(t.shape, t.ndim));
      }
      extent = t.stride[dim] * (t.shape[dim] - 1) + extent;
    }
  }

  void pointer(const char* name, const lemo_tensor& t) const {
    if (t.data == nullptr) invalid(std::string(name) + ": expected a data pointer, got NULL for " + describe(t));
    const auto alignment = static_cast<uintptr_t>(!on_cpu() && is_half(t) && t.ndim > 1 ? 16 : dtype_size(t.dtype));
    if (reinterpret_cast<uintptr_t>(t.data) % alignment != 0) {
      invalid(std::string(name) + ": expected data aligned to " + std::to_string(alignment) +
              " bytes, got an address that is not");
    }
  }

  const lemo_exec& exec_;
  Purpose purpose_;
};

}  // namespace lemo
