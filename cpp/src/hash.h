// The hash behind lemo_hash_uniform, one definition for host and device code.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LEMO_HOST_DEVICE __host__ __device__
#else
#define LEMO_HOST_DEVICE
#endif

namespace lemo {

// splitmix64 of (seed, index), mapped to (0, 1).
LEMO_HOST_DEVICE inline double hash_uniform(uint64_t seed, uint64_t index) {
  uint64_t z = seed + (index + 1) * UINT64_C(0x9E3779B97F4A7C15);
  z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
  z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
  z ^= z >> 31;
  return (static_cast<double>(z >> 11) + 0.5) * 0x1.0p-53;
}

}  // namespace lemo
