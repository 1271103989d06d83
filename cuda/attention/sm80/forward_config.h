// Tile sizes of the mma.sync forward kernel, the same for every head_dim. Accumulators dominate the register
// budget (255 a thread); shared memory stays under the 163 KiB an sm_80 block may have.
#pragma once

namespace lemo::cuda::attention::sm80 {

// A warp owns 32 queries, so that every key fragment feeds two products; or 16, if the outputs of head_dim 256, or what
// the options of scores need, leave room for no more.
template <int kHeadDim, bool kOptions>
struct ForwardConfig {
  static constexpr int kQueries = 128;
  static constexpr int kKeys = 64;
  static constexpr int kWarps = kHeadDim > 128 || kOptions ? 8 : 4;
  static constexpr bool kQueriesInRegisters = kHeadDim <= 64;
};

// How many steps of the q.k product are unrolled when queries come from shared memory: all of them on sm_90; on sm_80,
// and with tile lists or options of scores, the compiler would then hoist so many loads that head_dim 128 spills.
template <bool kFew>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kScoreUnroll = 4;
#else
constexpr int kScoreUnroll = kFew ? 4 : 16;
#endif

}  // namespace lemo::cuda::attention::sm80
