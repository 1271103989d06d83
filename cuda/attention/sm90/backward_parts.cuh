// The gradients of a key tile whose list is shared by several thread blocks.
#pragma once

#include <cute/tensor.hpp>

#include "attention/sm90/backward_params.h"
#include "common/mma.cuh"
#include "common/sm90/pipeline.cuh"

namespace lemo::cuda::attention::sm90 {

// Called by the consumers of every unit; false if others will store its tile's gradients. The part that arrives last
// gets the sums of all, in the order of the parts. `word`: of shared memory, free by now.
template <int kHeadDim, class Gradient>
__device__ __forceinline__ bool add_parts(const BackwardKernelParams& params, const BackwardUnit& unit, int key_head,
                                          int* word, Gradient& dk, Gradient& dv) {
  if (unit.parts == 1) return true;
  constexpr int kThreads = kBackwardConsumers * 128, kQuads = decltype(cute::size(dk))::value / 4;
  static_assert(kQuads * 4 * kThreads == kBackwardKeys * kHeadDim);
  constexpr int kPart = 2 * kQuads * kThreads;  // in quads
  const int thread = thread_index() - 128;
  const int64_t first = static_cast<int64_t>(unit.partials) * params.key_heads + key_head;
  float4* quads = reinterpret_cast<float4*>(params.partials) + first * kPart + thread;
  const int64_t stride = static_cast<int64_t>(params.key_heads) * kPart;  // from part to part
  const auto meet = [] { cutlass::arch::NamedBarrier::sync(kThreads, kBackwardConsumersMeet); };

  float4* own = quads + unit.part * stride;
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    own[i * kThreads] = make_float4(dk(4 * i), dk(4 * i + 1), dk(4 * i + 2), dk(4 * i + 3));
    own[(kQuads + i) * kThreads] = make_float4(dv(4 * i), dv(4 * i + 1), dv(4 * i + 2), dv(4 * i + 3));
  }
  __threadfence();
  meet();
  if (thread == 0) *word = atomicAdd(params.arrived + first, 1);
  meet();
  if (*word != unit.parts - 1) return false;
  __threadfence();
  cute::clear(dk);
  cute::clear(dv);
#pragma unroll 1
  for (int part = 0; part < unit.parts; ++part, quads += stride) {
    const auto add = [&](Gradient& sum, const float4* source) {
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        const float4 quad = __ldcg(source + i * kThreads);
        sum(4 * i) += quad.x;
        sum(4 * i + 1) += quad.y;
        sum(4 * i + 2) += quad.z;
        sum(4 * i + 3) += quad.w;
      }
    };
    add(dk, quads);
    add(dv, quads + kQuads * kThreads);
  }
  return true;
}

}  // namespace lemo::cuda::attention::sm90
