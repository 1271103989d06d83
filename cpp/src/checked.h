// Sizes that come from a caller, multiplied and added without wrapping around.
#pragma once

#include <cstdint>
#include <string>

#include "src/backend.h"

namespace lemo {

// A size of at least 0. It remembers if a product or a sum exceeded PTRDIFF_MAX; bytes() then throws.
class Size {
 public:
  Size(int64_t value) : value_(value), fits_(value >= 0) {}  // NOLINT: sizes are written as plain numbers

  friend Size operator*(Size a, Size b) {
    Size out(0);
    out.fits_ = a.fits_ && b.fits_ && !__builtin_mul_overflow(a.value_, b.value_, &out.value_);
    return out;
  }
  friend Size operator+(Size a, Size b) {
    Size out(0);
    out.fits_ = a.fits_ && b.fits_ && !__builtin_add_overflow(a.value_, b.value_, &out.value_);
    return out;
  }

  bool fits() const { return fits_; }

  int64_t count(const char* name) const { return bytes(name, 1); }
  // The size of this many elements in bytes; `name` is what needs them.
  int64_t bytes(const char* name, int64_t element_size) const {
    const Size total = *this * element_size;
    if (total.fits_) return total.value_;
    throw Error(LEMO_INVALID_ARGUMENT, std::string(name) + ": expected sizes that take at most PTRDIFF_MAX bytes (" +
                                           std::to_string(INT64_MAX) + "), got sizes whose product is larger");
  }
  uint64_t floats(const char* name) const { return static_cast<uint64_t>(bytes(name, sizeof(float))); }

 private:
  int64_t value_;
  bool fits_;
};

}  // namespace lemo
