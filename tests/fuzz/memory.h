// Memory for the fuzz driver: exact sizes, snapshots, and allocations that fail when asked to.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <list>
#include <random>
#include <vector>

#include "lemo/lemo.h"

namespace fuzz {

// -1: allocations of the library succeed; n: n more do, and then none. (The definitions of operator new are in
// fuzz.cc.)
inline std::atomic<int64_t> allocations_left{-1};

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  // A whole number from low to high.
  int64_t in(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(engine_() % static_cast<uint64_t>(high - low + 1));
  }
  bool once_in(int64_t n) { return in(1, n) == 1; }
  float number() { return static_cast<float>(in(-1000, 1000)) / 500.0f; }
  template <class T>
  T one_of(std::initializer_list<T> values) {
    return values.begin()[in(0, static_cast<int64_t>(values.size()) - 1)];
  }

 private:
  std::mt19937_64 engine_;
};

constexpr int64_t kElementSize[] = {4, 2, 2, 4, 8, 1};

// Bytes from the first to the last element, or -1 if no memory can have that size.
inline int64_t span_of(const lemo_tensor& t) {
  if (t.ndim < 1 || t.ndim > LEMO_MAX_DIMS || t.dtype < 0 || t.dtype > 5) return -1;
  __int128 last = 0;
  for (int32_t i = 0; i < t.ndim; ++i) {
    if (t.shape[i] < 0 || (t.shape[i] > 1 && t.stride[i] < 0)) return -1;
    if (t.shape[i] == 0) return 0;
    if (t.shape[i] > 1) last += static_cast<__int128>(t.shape[i] - 1) * t.stride[i];
    if (last > (int64_t{1} << 22)) return -1;
  }
  return (static_cast<int64_t>(last) + 1) * kElementSize[t.dtype];
}

// One allocation of an exact size, so that the sanitizer sees the first byte beyond it.
struct Block {
  explicit Block(size_t size)
      : bytes(size == 0 ? nullptr : static_cast<unsigned char*>(std::malloc(size))), size(size) {
    if (size > 0 && bytes == nullptr) std::abort();
  }
  ~Block() { std::free(bytes); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  void remember() { before.assign(bytes, bytes + size); }
  bool changed() const { return size > 0 && std::memcmp(bytes, before.data(), size) != 0; }

  unsigned char* bytes;
  size_t size;
  std::vector<unsigned char> before;
};

// The blocks of one call.
class Memory {
 public:
  explicit Memory(Random& random) : random_(random) {}

  lemo_tensor tensor(int32_t dtype, std::initializer_list<int64_t> shape, bool gaps = true) {
    lemo_tensor t = {};
    t.dtype = dtype;
    t.ndim = static_cast<int32_t>(shape.size());
    int64_t next = 1;
    for (int32_t i = t.ndim; i-- > 0;) {
      t.shape[i] = shape.begin()[i];
      t.stride[i] = next;
      next = next * std::max<int64_t>(t.shape[i], 1) + (gaps && random_.once_in(3) ? random_.in(1, 5) : 0);
    }
    place(t);
    return t;
  }

  lemo_tensor floats(std::initializer_list<int64_t> shape) { return tensor(LEMO_F32, shape); }

  template <class T>
  lemo_tensor list(int32_t dtype, const std::vector<T>& values) {
    lemo_tensor t = tensor(dtype, {static_cast<int64_t>(values.size())}, false);
    if (!values.empty()) std::memcpy(t.data, values.data(), values.size() * sizeof(T));
    return t;
  }
  lemo_tensor ints(const std::vector<int32_t>& values) { return list(LEMO_I32, values); }

  // Memory of exactly the tensor's span, if it has one. Contents: small numbers of the tensor's type.
  void place(lemo_tensor& t) {
    const int64_t span = span_of(t);
    if (span < 0) return;
    Block& block = blocks_.emplace_back(static_cast<size_t>(span));
    t.data = block.bytes;
    for (int64_t i = 0; i < span / kElementSize[t.dtype]; ++i) {
      if (t.dtype == LEMO_F32) {
        reinterpret_cast<float*>(block.bytes)[i] = random_.number();
      } else if (t.dtype == LEMO_I32) {
        reinterpret_cast<int32_t*>(block.bytes)[i] = static_cast<int32_t>(random_.in(-1, 5));
      } else {
        std::memset(block.bytes + i * kElementSize[t.dtype], static_cast<int>(random_.in(0, 3)),
                    static_cast<size_t>(kElementSize[t.dtype]));
      }
    }
  }

  Block* find(const void* address) {
    for (Block& block : blocks_) {
      const auto* at = static_cast<const unsigned char*>(address);
      if (block.size > 0 && at >= block.bytes && at < block.bytes + block.size) return &block;
    }
    return nullptr;
  }

  void remember() {
    for (Block& block : blocks_) block.remember();
  }
  void restore() {
    for (Block& block : blocks_) {
      if (block.size > 0) std::memcpy(block.bytes, block.before.data(), block.size);
    }
  }
  bool changed() const {
    return std::any_of(blocks_.begin(), blocks_.end(), [](const Block& block) { return block.changed(); });
  }

 private:
  Random& random_;
  std::list<Block> blocks_;
};

// Whether anything but the elements of an output has changed in its block: gaps between rows belong to the caller.
inline bool gaps_changed(const lemo_tensor& t, const Block& block) {
  std::vector<unsigned char> now(block.bytes, block.bytes + block.size);
  const int64_t size = kElementSize[t.dtype];
  int64_t at[LEMO_MAX_DIMS] = {};
  for (int32_t i = t.ndim - 1; i >= 0;) {
    int64_t offset = static_cast<unsigned char*>(t.data) - block.bytes;
    for (int32_t j = 0; j < t.ndim; ++j) offset += at[j] * (t.shape[j] > 1 ? t.stride[j] : 0) * size;
    std::memcpy(now.data() + offset, block.before.data() + offset, static_cast<size_t>(size));
    for (i = t.ndim - 1; i >= 0 && ++at[i] == t.shape[i]; --i) at[i] = 0;
  }
  return std::memcmp(now.data(), block.before.data(), block.size) != 0;
}

}  // namespace fuzz
