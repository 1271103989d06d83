// Tile sizes of the mma.sync backward kernels, one row per head_dim. Accumulators dominate the register budget (255 a
// thread); shared memory stays under the 163 KiB an sm_80 block may have.
#pragma once

namespace lemo::cuda::attention::sm80 {

// Gradients of keys and values: a warp owns 16 keys and holds their two gradients in registers. kDqRowWarps x
// kDqColumnWarps warps share the product for dq, each a part whose rows and columns are multiples of 16, as square as
// possible so that it loads the fewest operands.
template <int kHeadDim>
struct KeyGradientConfig;
template <>  // the two gradients take only 64 registers, which leaves room for twice the queries
struct KeyGradientConfig<64> {
  static constexpr int kQueries = 128, kKeys = 128, kWarps = 8, kDqRowWarps = 4, kDqColumnWarps = 2;
};
template <>  // 80 columns cannot be shared in multiples of 16, so rows are: 64 queries occupy four warps
struct KeyGradientConfig<80> {
  static constexpr int kQueries = 64, kKeys = 64, kWarps = 4, kDqRowWarps = 4, kDqColumnWarps = 1;
};
template <>  // parts of 16 x 48; 32 x 24 would not be multiples of 16
struct KeyGradientConfig<96> {
  static constexpr int kQueries = 64, kKeys = 128, kWarps = 8, kDqRowWarps = 4, kDqColumnWarps = 2;
};
template <>  // parts of 32 x 32
struct KeyGradientConfig<128> {
  static constexpr int kQueries = 64, kKeys = 128, kWarps = 8, kDqRowWarps = 2, kDqColumnWarps = 4;
};

// Gradient of queries in a separate kernel (deterministic mode): a warp owns 16 queries.
template <int kHeadDim>
struct QueryGradientConfig {
  static constexpr int kQueries = 128;
  static constexpr int kKeys = 64;
  static constexpr int kWarps = 8;
};

}  // namespace lemo::cuda::attention::sm80
