// Tiles for wgmma in CuTe terms, and the one way products are issued.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>
#include <type_traits>

#include "cuda/common/mma.cuh"

namespace lemo::cuda::attention::hopper {

// CuTe's name of an element type, and back.
template <typename T>
using GmmaElement = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, cutlass::bfloat16_t, cutlass::half_t>;

// [rows, head_dim] as TMA leaves it: slabs of one swizzle span, rows first. RowLoader describes the same memory.
template <typename Element, int kHeadDim>
using RowAtom = std::conditional_t<kHeadDim % 64 == 0, cute::GMMA::Layout_K_SW128_Atom<Element>,
                                   cute::GMMA::Layout_K_SW64_Atom<Element>>;
template <typename Element, int kRows, int kHeadDim, int kStages>
using RowLayout = decltype(cute::tile_to_shape(
    RowAtom<Element, kHeadDim>{}, cute::Shape<cute::Int<kRows>, cute::Int<kHeadDim>, cute::Int<kStages>>{}));

// The same memory seen as [head_dim, rows].
template <typename Element, int kHeadDim>
using ColumnAtom = std::conditional_t<kHeadDim % 64 == 0, cute::GMMA::Layout_MN_SW128_Atom<Element>,
                                      cute::GMMA::Layout_MN_SW64_Atom<Element>>;
template <typename Element, int kRows, int kHeadDim, int kStages>
using TransposedLayout = decltype(cute::tile_to_shape(
    ColumnAtom<Element, kHeadDim>{}, cute::Shape<cute::Int<kHeadDim>, cute::Int<kRows>, cute::Int<kStages>>{},
    cute::Step<cute::_2, cute::_1, cute::_3>{}));

// c = a b (kClear) or c += a b, asynchronously, as one batch.
template <bool kClear, class Mma, class A, class B, class C>
__device__ __forceinline__ void issue(Mma& mma, A const& a, B const& b, C& c) {
  using namespace cute;
  constexpr bool kFragment = !is_base_of<GMMA::DescriptorIterator, typename Mma::FrgTypeA>::value;
  if constexpr (kFragment) warpgroup_fence_operand(const_cast<A&>(a));
  warpgroup_fence_operand(c);
  warpgroup_arrive();
  if constexpr (kClear) mma.accumulate_ = GMMA::ScaleOut::Zero;
  CUTE_UNROLL
  for (int k = 0; k < size<2>(a); ++k) {
    cute::gemm(mma, a(_, _, k), b(_, _, k), c);
    mma.accumulate_ = GMMA::ScaleOut::One;
  }
  warpgroup_commit_batch();
  warpgroup_fence_operand(c);
  if constexpr (kFragment) warpgroup_fence_operand(const_cast<A&>(a));
}

}  // namespace lemo::cuda::attention::hopper
