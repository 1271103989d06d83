// Tile sizes of the mma.sync forward kernel, the same for every head_dim. Accumulators dominate the register budget
// (255 a thread); shared memory stays under the 163 KiB an sm_80 block may have.
#pragma once

namespace lemo::cuda::attention::sm80 {

// A warp owns 32 queries, so that every key fragment feeds two products.
template <int kHeadDim>
struct ForwardConfig {
  static constexpr int kQueries = 128;
  static constexpr int kKeys = 64;
  static constexpr int kWarps = 4;
  static constexpr bool kQueriesInRegisters = kHeadDim <= 64;
};

// How many steps of the q.k product are unrolled when queries come from shared memory: all of them on sm_90; on sm_80,
// and with tile lists, the compiler would then hoist so many loads that head_dim 128 spills.
template <bool kListed>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kScoreUnroll = 4;
#else
constexpr int kScoreUnroll = kListed ? 4 : 16;
#endif

}  // namespace lemo::cuda::attention::sm80
