// Tile sizes of the mma.sync kernels, one row per head_dim. Accumulators dominate the register budget (255 a thread);
// shared memory stays under the 163 KiB an sm_80 block may have.
#pragma once

namespace lemo::cuda::attention {

// Every shared-memory row is padded by 16 bytes: an odd number of 16-byte units, so that the eight rows of an ldmatrix
// fall into different banks for every head_dim, and addresses stay linear.
constexpr int kPadding = 8;

// Forward: a warp owns 32 queries, so that every key fragment feeds two products.
template <int kHeadDim>
struct ForwardConfig {
  static constexpr int kQueries = 128;
  static constexpr int kKeys = 64;
  static constexpr int kWarps = 4;
  static constexpr bool kQueriesInRegisters = kHeadDim <= 64;
};

// Steps of the q.k product that are unrolled where queries come from shared memory: all of them on sm_90; on sm_80 the
// compiler would hoist so many loads that head_dim 128 spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kScoreUnroll = 4;
#else
constexpr int kScoreUnroll = 16;
#endif

// Gradients of keys and values: a warp owns 16 keys and holds their two gradients in registers.
// kDqRowWarps x kDqColumnWarps warps share the product for dq.
template <int kHeadDim>
struct KeyGradientConfig;
template <>
struct KeyGradientConfig<64> {
  static constexpr int kQueries = 128, kKeys = 128, kWarps = 8, kDqRowWarps = 4, kDqColumnWarps = 2;
};
template <>
struct KeyGradientConfig<80> {
  static constexpr int kQueries = 64, kKeys = 64, kWarps = 4, kDqRowWarps = 4, kDqColumnWarps = 1;
};
template <>
struct KeyGradientConfig<96> {
  static constexpr int kQueries = 64, kKeys = 128, kWarps = 8, kDqRowWarps = 4, kDqColumnWarps = 2;
};
template <>
struct KeyGradientConfig<128> {
  static constexpr int kQueries = 64, kKeys = 128, kWarps = 8, kDqRowWarps = 2, kDqColumnWarps = 4;
};

// Gradient of queries on its own (deterministic mode): a warp owns 16 queries.
template <int kHeadDim>
struct QueryGradientConfig {
  static constexpr int kQueries = 128;
  static constexpr int kKeys = 64;
  static constexpr int kWarps = 8;
};

}  // namespace lemo::cuda::attention
