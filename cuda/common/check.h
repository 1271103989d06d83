// CUDA errors as lemo::Error, the device guard, and small host-side helpers shared by every launcher.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "src/backend.h"
#include "src/checked.h"

namespace lemo::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw Error(LEMO_BACKEND_ERROR,
              std::string(what) + ": " + cudaGetErrorName(status) + ": " + cudaGetErrorString(status));
}

// After a launch: reports (and clears) a launch error. Nothing is synchronized, so faults inside a kernel surface in a
// later call.
inline void check_launch(const char* what) { check(cudaGetLastError(), what); }

// Makes `device` current for the calling thread, and restores the caller's device.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device_) check(cudaSetDevice(device_), "exec.device_index: cudaSetDevice");
  }
  ~DeviceGuard() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_;
  int before_ = 0;
};

struct DeviceInfo {
  int capability;  // major * 10 + minor
  int multiprocessors;
};
// Cached; throws if the ordinal names no device. LEMO_CUDA_CAPABILITY=80 in the environment makes newer devices use
// the sm_80 kernels, so that the fallback can be tested on them.
DeviceInfo device_info(int device);

inline cudaStream_t stream_of(const lemo_exec& exec) { return static_cast<cudaStream_t>(exec.stream); }
inline bool present(const lemo_tensor& t) { return t.ndim != 0; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Elements from one row of a matrix to the next. The stride of a single row carries no meaning.
inline int64_t row_stride(const lemo_tensor& t) { return t.shape[0] > 1 ? t.stride[0] : round_up(t.shape[1], 8); }

template <class T>
T* data(const lemo_tensor& t) {
  return present(t) ? static_cast<T*>(t.data) : nullptr;
}

// Cuts the workspace into 256-byte aligned pieces. With base == nullptr it only adds up sizes, so one function that
// lays out an operation's pieces gives both the size and the addresses.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(Size count) {
    char* at = base_ == nullptr ? nullptr : base_ + size_;
    constexpr int64_t kAlignment = 256;
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + (kAlignment - 1)).count("exec.workspace");
    size_ = (Size(size_) + bytes / kAlignment * kAlignment).count("exec.workspace");
    return reinterpret_cast<T*>(at);
  }
  uint64_t size() const { return static_cast<uint64_t>(size_); }

 private:
  char* base_;
  int64_t size_ = 0;
};

}  // namespace lemo::cuda
