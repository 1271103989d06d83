// Ampere and every device without more specific kernels: CUTLASS 2 multistage GEMM, mma.sync on 128 x 128 tiles.
//
// Vector accesses are predicated by their first element, so extents that are not multiples of 8 read and write the
// padding between a row's end and its leading dimension (see common/gemm.h); can_implement() would refuse them. A k
// that is not a multiple of 8 is the exception: the kernels take k's remainder first, which would misalign every later
// load along it, so the remainder becomes a separate product.
#pragma once

#include <type_traits>

#include "common/check.h"
#include "common/gemm.h"
#include "cutlass/epilogue/thread/linear_combination.h"
#include "cutlass/epilogue/thread/linear_combination_leaky_relu.h"
#include "cutlass/gemm/device/gemm_universal.h"

namespace lemo::cuda::sm80 {

template <class Element, GemmKind kKind>
struct Kernel {
  using Out = std::conditional_t<kKind == GemmKind::kTN, float, Element>;
  using LayoutA = std::conditional_t<kKind == GemmKind::kTN, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
  using LayoutB = std::conditional_t<kKind == GemmKind::kNT, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
  static constexpr int kVector = 16 / sizeof(Out);
  // Slope 1 is the identity, slope 0 ReLU.
  using Epilogue = std::conditional_t<kKind == GemmKind::kNT,
                                      cutlass::epilogue::thread::LinearCombinationLeakyRelu<Out, kVector, float, float>,
                                      cutlass::epilogue::thread::LinearCombination<Out, kVector, float, float>>;
  using Device =
      cutlass::gemm::device::GemmUniversal<Element, LayoutA, Element, LayoutB, Out, cutlass::layout::RowMajor, float,
                                           cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80,
                                           cutlass::gemm::GemmShape<128, 128, 32>, cutlass::gemm::GemmShape<64, 64, 32>,
                                           cutlass::gemm::GemmShape<16, 8, 16>, Epilogue,
                                           cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>, 4, 8, 8>;

  static void run(const Gemm& g, cudaStream_t stream) {
    const int64_t remainder = g.k % 8;
    if (kKind != GemmKind::kNN || remainder == 0 || g.k < 8) return run_aligned(g, stream);
    const int64_t whole = g.k - remainder;
    Gemm last = g, rest = g;
    last.a = static_cast<const Element*>(g.a) + whole;
    last.b = static_cast<const Element*>(g.b) + whole * g.ldb;
    last.k = remainder;
    rest.k = whole;
    rest.beta = 1.0f;
    run_aligned(last, stream);  // first, so that the sum is rounded while it is still small
    run_aligned(rest, stream);
  }

  static void run_aligned(const Gemm& g, cudaStream_t stream) {
    typename Epilogue::Params epilogue;
    if constexpr (kKind == GemmKind::kNT) {
      epilogue = typename Epilogue::Params(g.alpha, g.beta, g.relu ? 0.0f : 1.0f);
    } else {
      epilogue = typename Epilogue::Params(g.alpha, g.beta);
      epilogue.alpha_ptr = g.alpha_device;
    }
    const typename Device::Arguments args(cutlass::gemm::GemmUniversalMode::kGemm,
                                          {static_cast<int>(g.m), static_cast<int>(g.n), static_cast<int>(g.k)}, 1,
                                          epilogue, g.a, g.b, g.d, g.d, 0, 0, 0, 0, g.lda, g.ldb, g.ldd, g.ldd);
    Device op;
    auto status = op.initialize(args, nullptr, stream);
    if (status == cutlass::Status::kSuccess) status = op.run(stream);
    check_launch("matrix product");
    if (status != cutlass::Status::kSuccess) {
      throw Error(LEMO_BACKEND_ERROR, std::string("matrix product: ") + cutlassGetStatusString(status));
    }
  }
};

template <class Element>
GemmKernels kernels() {
  GemmKernels table;
  table.workspace = [](const Gemm&, int, int) -> uint64_t { return 0; };
  table.run = [](const Gemm& g, int, int, void*, cudaStream_t stream) {
    switch (g.kind) {
      case GemmKind::kNT:
        return Kernel<Element, GemmKind::kNT>::run(g, stream);
      case GemmKind::kNN:
        return Kernel<Element, GemmKind::kNN>::run(g, stream);
      default:
        return Kernel<Element, GemmKind::kTN>::run(g, stream);
    }
  };
  return table;
}

}  // namespace lemo::cuda::sm80
