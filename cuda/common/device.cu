#include <array>
#include <atomic>
#include <cstdlib>

#include "common/check.h"

namespace lemo::cuda {

DeviceInfo device_info(int device) {
  constexpr int kMaxDevices = 64;
  // capability and multiprocessors in one word, so that a reader sees both or neither
  static std::array<std::atomic<int64_t>, kMaxDevices> cache = {};
  if (device < 0 || device >= kMaxDevices) {
    throw Error(LEMO_INVALID_ARGUMENT, "exec.device_index: expected a CUDA ordinal below " +
                                           std::to_string(kMaxDevices) + ", got " + std::to_string(device));
  }
  auto& entry = cache[static_cast<size_t>(device)];
  int64_t packed = entry.load(std::memory_order_acquire);
  if (packed == 0) {
    int major = 0, minor = 0, multiprocessors = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "exec.device_index");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "exec.device_index");
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "exec.device_index");
    int capability = major * 10 + minor;
    if (const char* wanted = std::getenv("LEMO_CUDA_CAPABILITY")) {
      const int value = std::atoi(wanted);
      if (value >= 80 && value < capability) capability = value;
    }
    packed = (int64_t{capability} << 32) | multiprocessors;
    entry.store(packed, std::memory_order_release);
  }
  return {static_cast<int>(packed >> 32), static_cast<int>(packed & 0xffffffff)};
}

}  // namespace lemo::cuda
