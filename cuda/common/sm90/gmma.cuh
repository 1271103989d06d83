// Tiles for wgmma in CuTe terms, and the one function that issues products.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>
#include <type_traits>

#include "common/mma.cuh"

namespace lemo::cuda::sm90 {

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

// c = a b (kClear) or c += a b, asynchronously, as one batch. With kParts > 1 only part kPart of that sum, which is cut
// into equal parts.
template <bool kClear, int kPart = 0, int kParts = 1, class Mma, class A, class B, class C>
__device__ __forceinline__ void issue(Mma& mma, A const& a, B const& b, C& c) {
  using namespace cute;
  constexpr bool kFragment = !is_base_of<GMMA::DescriptorIterator, typename Mma::FrgTypeA>::value;
  if constexpr (kFragment) warpgroup_fence_operand(const_cast<A&>(a));
  warpgroup_fence_operand(c);
  warpgroup_arrive();
  if constexpr (kClear) mma.accumulate_ = GMMA::ScaleOut::Zero;
  constexpr int kDepth = decltype(size<2>(a))::value / kParts;
  CUTE_UNROLL
  for (int k = kPart * kDepth; k < (kPart + 1) * kDepth; ++k) {
    cute::gemm(mma, a(_, _, k), b(_, _, k), c);
    mma.accumulate_ = GMMA::ScaleOut::One;
  }
  warpgroup_commit_batch();
  warpgroup_fence_operand(c);
  if constexpr (kFragment) warpgroup_fence_operand(const_cast<A&>(a));
}

// 64 rows of a tile in RowLayout, from row `first_row` on, as a warpgroup's left operand in registers; K-major SW128
// atoms. Called by the whole warpgroup.
template <int kRows, int kHeadDim, typename Element>
__device__ __forceinline__ auto hold_rows(const Element* tile, int first_row) {
  static_assert(kHeadDim % 64 == 0);
  using namespace cute;
  auto held = make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<kHeadDim / 16>>>{});
  auto packed = recast<uint32_t>(held);
  const LaneOffset lane = lane_offset_rows_first(thread_index() % 32);
  const int row = first_row + thread_index() / 32 % 4 * 16 + lane.row;
  CUTE_UNROLL
  for (int k = 0; k < kHeadDim / 16; ++k) {
    const int chunk = k % 4 * 2 + lane.column / 8;
    uint32_t matrices[4];
    load_matrices(matrices, shared_address(tile) + (k / 4 * kRows + row) * 128 + (chunk ^ row % 8) * 16);
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) packed(k * 4 + i) = matrices[i];
  }
  return held;
}

// Four 8 x 8 matrices of 16-bit elements, as accumulators hold them, to rows of 16 bytes.
__device__ __forceinline__ void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

}  // namespace lemo::cuda::sm90
