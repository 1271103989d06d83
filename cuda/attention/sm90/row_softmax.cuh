// Online softmax over wgmma accumulators, in base 2.
//
// Element j of an accumulator [64, columns]: row lane / 4 + 8 * (j / 2 % 2) of the warp's 16, column
// j / 4 * 8 + lane % 4 * 2 + j % 2. A row lies in the four lanes of a quad.
#pragma once

#include <cute/tensor.hpp>

#include "attention/softmax.cuh"
#include "common/mma.cuh"

namespace lemo::cuda::attention::sm90 {

// kMayHide: rows may be masked in any of their tiles, and in all of them.
template <bool kMayHide>
class RowSoftmax {
 public:
  // Scores become exp2(scale_log2 * (score - running maximum)). Without kMayHide, every row has a score above
  // -infinity from the first tile on: its own key's.
  template <class Scores>
  __device__ __forceinline__ void update(Scores& s, float scale_log2) {
    constexpr int kSize = decltype(cute::size(s))::value;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float maximum = maximum_[r];
#pragma unroll
      for (int j = 0; j < kSize; j += 4) maximum = fmaxf(maximum, fmaxf(s(j + 2 * r), s(j + 2 * r + 1)));
      maximum = quad_max(maximum);
      const float offset = maximum * scale_log2;
      correction_[r] = exp2_fast(fmaf(maximum_[r], scale_log2, -offset));
      maximum_[r] = maximum;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kSize; j += 4) {
        s(j + 2 * r) = exp2_fast(fmaf(s(j + 2 * r), scale_log2, -offset));
        s(j + 2 * r + 1) = exp2_fast(fmaf(s(j + 2 * r + 1), scale_log2, -offset));
        sum += s(j + 2 * r) + s(j + 2 * r + 1);
      }
      sum_[r] = fmaf(sum_[r], correction_[r], sum);
    }
  }

  // Rescales the sums from before the last update to the new maximum.
  template <class Out>
  __device__ __forceinline__ void rescale(Out& out) const {
    constexpr int kSize = decltype(cute::size(out))::value;
    // The maximum settles after a few tiles; from then on a warp skips this.
    if (__all_sync(0xffffffffu, correction_[0] == 1.0f && correction_[1] == 1.0f)) return;
#pragma unroll
    for (int j = 0; j < kSize; ++j) out(j) *= correction_[j / 2 % 2];
  }

  // After the last tile: 1 / sum, and lse (natural logarithm) of row r; of one that saw no key, 0 and -infinity.
  __device__ __forceinline__ void finish(int r, float scale_log2, float& inverse, float& lse) const {
    const float sum = quad_sum(sum_[r]);
    inverse = 1.0f / sum;
    // Not left to contraction: this is inlined where an item ends by itself and where the next one overlaps it, which
    // the order of work decides, and the compiler fused only one of the two.
    lse = fmaf(maximum_[r], scale_log2 * kLn2, logf(sum));
    if (kMayHide && sum == 0.0f) {
      inverse = 0.0f;
      lse = -INFINITY;
    }
  }

 private:
  // A power of two times the scale is exact: a masked row's correction is then exp2(0), and its scores are 0.
  static constexpr float kLowest = kMayHide ? -0x1p100f : -INFINITY;
  float maximum_[2] = {kLowest, kLowest};
  float sum_[2] = {0.0f, 0.0f};
  float correction_[2];
};

}  // namespace lemo::cuda::attention::sm90
