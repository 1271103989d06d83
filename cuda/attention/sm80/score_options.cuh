// Windows and soft-caps, for the instantiations that have them (kOptions).
#pragma once

#include <climits>

#include "attention/params.h"
#include "common/constants.h"
#include "common/document_tiles.cuh"
#include "common/mma.cuh"

namespace lemo::cuda::attention::sm80 {

// The places of one document's packed rows, which are counted from `start`.
struct DocumentPlaces {
  const int32_t* places;  // ScoreOptions
  int start;
  int first, length;  // the rows that exist

  __device__ __forceinline__ int64_t operator()(int row) const {
    return places != nullptr ? places[start + row] : start + row;
  }

  // Of the nearest row that exists.
  __device__ __forceinline__ int64_t nearest(int row) const { return (*this)(max(first, min(row, length - 1))); }

  // The first row whose place is at least `bound`, or `length`. By a whole warp, which looks at 32 rows at a time:
  // among a million, 4 loads that wait for each other, where halving takes 20.
  __device__ __forceinline__ int first_from(int64_t bound) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    int low = first, high = length;
    while (low < high) {
      const int step = (high - low + 31) / 32, row = low + lane * step;
      const bool below = row < high && (*this)(row) < bound;
      const int count = __popc(__ballot_sync(0xffffffffu, below));
      if (count == 0) return low;
      high = min(high, low + count * step);
      low += (count - 1) * step + 1;
    }
    return low;
  }
};

// Below every score, and finite times any scale: a row may be masked in all of its tiles.
constexpr float kLowestWithOptions = -1e30f;

// tanh by one exponential: to 1e-7 in absolute terms, which is what a score of c tanh needs. +-1 beyond the exponent.
__device__ __forceinline__ float tanh_of(float x) {
  return 1.0f - __fdividef(2.0f, 1.0f + exp2_fast(x * 2.0f * kLog2E));
}

// lse of a query for the probabilities: those of one that saw no key (lse = -infinity) are 0, its masked scores
// included.
__device__ __forceinline__ float closed_lse(float lse) { return lse == -INFINITY ? INFINITY : lse; }

// Factor of what soft_cap returns (or of q.k, without a soft-cap) in the exponent.
__device__ __forceinline__ float exponent_scale(const ScoreOptions& options, float scale) {
  return options.softcap > 0.0f ? 1.0f : scale;
}

// q.k, soft-capped.
template <int kTiles>
__device__ __forceinline__ void soft_cap(float (&s)[kTiles][4], const ScoreOptions& options, float scale) {
  if (options.softcap <= 0.0f) return;
  const float factor = scale / options.softcap;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) s[n][c] = options.softcap * tanh_of(s[n][c] * factor);
  }
}

// The same, and `ds` (dout.v - delta) times the derivative.
template <int kTiles>
__device__ __forceinline__ void soft_cap(float (&s)[kTiles][4], float (&ds)[kTiles][4], const ScoreOptions& options,
                                         float scale) {
  if (options.softcap <= 0.0f) return;
  const float factor = scale / options.softcap;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float t = tanh_of(s[n][c] * factor);
      s[n][c] = options.softcap * t;
      ds[n][c] *= 1.0f - t * t;
    }
  }
}

}  // namespace lemo::cuda::attention::sm80
