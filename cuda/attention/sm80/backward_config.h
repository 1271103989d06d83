// Tile sizes of the mma.sync backward kernels, one row per head_dim. Accumulators dominate the register budget (255 a
// thread); shared memory stays under the 163 KiB an sm_80 block may have.
#pragma once

namespace lemo::cuda::attention::sm80 {

// Gradients of keys and values: a warp owns 16 keys and holds their two gradients in registers. kDqRowWarps x
// kDqColumnWarps warps share the product for dq, each a part whose rows and columns are multiples of 16, as square as
// possible so that it loads the fewest operands. kColumnParts blocks share a key tile: each computes all scores, and
// part of the columns of the three gradients.
// Soft-caps keep both products alive: with kOptions, fewer queries.
template <int kHeadDim, bool kOptions>
struct KeyGradientConfig;
template <bool kOptions>  // the two gradients take only 64 registers, which leaves room for twice the queries
struct KeyGradientConfig<64, kOptions> {
  static constexpr int kQueries = kOptions ? 64 : 128, kKeys = 128, kWarps = 8, kDqRowWarps = 4, kDqColumnWarps = 2,
                       kColumnParts = 1;
};
template <bool kOptions>  // 80 columns cannot be shared in multiples of 16, so rows are: 64 queries occupy four warps
struct KeyGradientConfig<80, kOptions> {
  static constexpr int kQueries = 64, kKeys = 64, kWarps = 4, kDqRowWarps = 4, kDqColumnWarps = 1, kColumnParts = 1;
};
template <bool kOptions>  // parts of 16 x 48; 32 x 24 would not be multiples of 16
struct KeyGradientConfig<96, kOptions> {
  static constexpr int kQueries = 64, kKeys = 128, kWarps = 8, kDqRowWarps = 4, kDqColumnWarps = 2, kColumnParts = 1;
};
template <bool kOptions>  // parts of 32 (16 with kOptions) x 32
struct KeyGradientConfig<128, kOptions> {
  static constexpr int kQueries = kOptions ? 32 : 64, kKeys = 128, kWarps = 8, kDqRowWarps = 2, kDqColumnWarps = 4,
                       kColumnParts = 1;
};
template <bool kOptions>  // two gradients of all columns would take more registers than a thread has; parts of 16 x 64
struct KeyGradientConfig<256, kOptions> {
  static constexpr int kQueries = 32, kKeys = 64, kWarps = 4, kDqRowWarps = 2, kDqColumnWarps = 2, kColumnParts = 2;
};

// Gradient of queries in a separate kernel (deterministic mode): a warp owns 16 queries.
template <int kHeadDim>
struct QueryGradientConfig {
  static constexpr int kQueries = 128;
  static constexpr int kKeys = 64;
  static constexpr int kWarps = 8;
};
template <>  // what fits into shared memory
struct QueryGradientConfig<256> {
  static constexpr int kQueries = 64;
  static constexpr int kKeys = 32;
  static constexpr int kWarps = 4;
};

}  // namespace lemo::cuda::attention::sm80
