// Online softmax of one warp's rows, in base 2. Row r of tile i sits in the four lanes of a quad.
#pragma once

#include <cfloat>

#include "attention/softmax.cuh"
#include "common/mma.cuh"

namespace lemo::cuda::attention::sm80 {

template <int kRowTiles>
class OnlineSoftmax {
 public:
  // `lowest`: finite, so that a scale of 0 makes no NaN.
  __device__ __forceinline__ explicit OnlineSoftmax(float lowest) {
#pragma unroll
    for (int r = 0; r < 2 * kRowTiles; ++r) {
      maximum_[r] = lowest;
      sum_[r] = 0.0f;
    }
  }

  // s becomes exp2(scale_log2 * (s - running maximum)); `out` is rescaled to that maximum. Every row must hold at least
  // one key that is not masked, or `lowest` times the scale be finite.
  template <int kKeyTiles, int kOutTiles>
  __device__ __forceinline__ void update(float (&s)[kRowTiles][kKeyTiles][4], float (&out)[kRowTiles][kOutTiles][4],
                                         float scale_log2) {
    float correction[2 * kRowTiles];
    bool unchanged = true;
#pragma unroll
    for (int r = 0; r < 2 * kRowTiles; ++r) {
      const int i = r / 2, c = (r % 2) * 2;
      float maximum = maximum_[r];
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) maximum = fmaxf(maximum, fmaxf(s[i][n][c], s[i][n][c + 1]));
      maximum = quad_max(maximum);
      unchanged = unchanged && maximum == maximum_[r];
      correction[r] = exp2_fast((maximum_[r] - maximum) * scale_log2);
      maximum_[r] = maximum;
    }
    // The maximum settles after a few tiles; from then on the whole warp skips the rescaling.
    if (!__all_sync(0xffffffffu, unchanged)) {
#pragma unroll
      for (int r = 0; r < 2 * kRowTiles; ++r) {
        sum_[r] *= correction[r];
#pragma unroll
        for (int n = 0; n < kOutTiles; ++n) {
          out[r / 2][n][(r % 2) * 2] *= correction[r];
          out[r / 2][n][(r % 2) * 2 + 1] *= correction[r];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2 * kRowTiles; ++r) {
      const int i = r / 2, c = (r % 2) * 2;
      const float offset = maximum_[r] * scale_log2;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        s[i][n][c] = exp2_fast(fmaf(s[i][n][c], scale_log2, -offset));
        s[i][n][c + 1] = exp2_fast(fmaf(s[i][n][c + 1], scale_log2, -offset));
        sum_[r] += s[i][n][c] + s[i][n][c + 1];
      }
    }
  }

  // After the last tile: 1 / sum, and lse (natural logarithm) of row r.
  __device__ __forceinline__ void finish(int r, float scale, float& inverse, float& lse) const {
    const float sum = quad_sum(sum_[r]);
    inverse = 1.0f / sum;
    lse = fmaf(maximum_[r], scale, logf(sum));
  }

 private:
  float maximum_[2 * kRowTiles];
  float sum_[2 * kRowTiles];
};

}  // namespace lemo::cuda::attention::sm80
