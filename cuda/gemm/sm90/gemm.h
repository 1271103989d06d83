// Hopper: CUTLASS 3 collectives, TMA and wgmma, cooperative warpgroups on 128 x 256 tiles.
//
// TMA clips every tile at the true extents (and fills with zeros), so odd m, n, k need no padding in the product; only
// addresses and leading dimensions must be aligned. CUTLASS's can_implement() asks for aligned extents as well and is
// therefore not consulted: the alignment that TMA needs is checked in gemm.cu.
#pragma once

#include <type_traits>

#include "common/check.h"
#include "common/gemm.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/thread/activation.h"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"

namespace lemo::cuda::sm90 {

constexpr int kTileRows = 128, kTileColumns = 256, kTileDepth = 64;
constexpr int kClusterRows = 2;  // tiles of one cluster, which share the columns' operand
constexpr int kFewestSteps = 8;  // of kTileDepth in a part of k, whose sums have to be added to the other parts'
using TileShape = cute::Shape<cute::Int<kTileRows>, cute::Int<kTileColumns>, cute::Int<kTileDepth>>;
using ClusterShape = cute::Shape<cute::Int<kClusterRows>, cute::_1, cute::_1>;

template <class Element, GemmKind kKind>
struct Kernel {
  static constexpr bool kFloatOut = kKind == GemmKind::kTN;
  using Out = std::conditional_t<kFloatOut, float, Element>;
  using LayoutA = std::conditional_t<kKind == GemmKind::kTN, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
  using LayoutB = std::conditional_t<kKind == GemmKind::kNT, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
  using LayoutD = cutlass::layout::RowMajor;
  static constexpr int kAlignOut = 16 / sizeof(Out);
  using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecializedCooperative;
  using MainloopSchedule = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  // LeakyReLU with slope 1 is the identity and with slope 0 ReLU: one kernel serves both.
  using Fusion = std::conditional_t<
      kKind == GemmKind::kNT,
      cutlass::epilogue::fusion::LinCombEltAct<cutlass::epilogue::thread::LeakyReLU, Out, float, Out, float>,
      cutlass::epilogue::fusion::LinearCombination<Out, float, Out, float>>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, Out, LayoutD, kAlignOut, Out, LayoutD, kAlignOut,
      EpilogueSchedule, Fusion>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, LayoutA, 8, Element, LayoutB, 8, float, TileShape,
      ClusterShape,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      MainloopSchedule>::CollectiveOp;
  // kNN serves products with a long k (the vocabulary) and few output tiles: k is split across thread blocks and the
  // partial sums are added in a fixed order.
  static constexpr bool kSplit = kKind == GemmKind::kNN;
  using Scheduler = std::conditional_t<kSplit, cutlass::gemm::StreamKScheduler, cutlass::gemm::PersistentScheduler>;
  using GemmKernel =
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue, Scheduler>;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<GemmKernel>;

  static typename Device::Arguments arguments(const Gemm& g, int device, int multiprocessors) {
    const auto m = static_cast<int>(g.m), n = static_cast<int>(g.n), k = static_cast<int>(g.k);
    // CUTLASS strides are (major, minor, batch); the leading dimension fills whichever mode is not the unit one.
    auto stride = [](auto s, int64_t ld) {
      if constexpr (std::is_same_v<std::decay_t<decltype(cute::get<0>(s))>, int64_t>) {
        cute::get<0>(s) = ld;
      } else {
        cute::get<1>(s) = ld;
      }
      return s;
    };
    const auto stride_a = stride(typename GemmKernel::StrideA{}, g.lda);
    const auto stride_b = stride(typename GemmKernel::StrideB{}, g.ldb);
    const auto stride_d = stride(typename GemmKernel::StrideD{}, g.ldd);
    typename Device::Arguments args{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {m, n, k, 1},
        {static_cast<const Element*>(g.a), stride_a, static_cast<const Element*>(g.b), stride_b},
        {{}, static_cast<const Out*>(g.d), stride_d, static_cast<Out*>(g.d), stride_d}};
    args.epilogue.thread.alpha = g.alpha;
    args.epilogue.thread.beta = g.beta;
    if constexpr (kKind == GemmKind::kNT) {
      args.epilogue.thread.activation.leaky_alpha = g.relu ? 0.0f : 1.0f;
    } else {
      args.epilogue.thread.alpha_ptr = g.alpha_device;
    }
    args.hw_info.device_id = device;
    args.hw_info.sm_count = multiprocessors;
    if constexpr (kSplit) {
      const int64_t tiles =
          ceil_div(g.m, kClusterRows * kTileRows) * kClusterRows * ceil_div(g.n, int64_t{kTileColumns});
      const int64_t most = ceil_div(g.k, kTileDepth) / kFewestSteps;
      int64_t splits = multiprocessors / tiles;
      if (splits > most) splits = most;
      args.scheduler.splits = splits < 1 ? 1 : static_cast<int>(splits);
      if (splits <= 1) {
        using Params = cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90StreamKParams;
        args.scheduler.decomposition_mode = Params::DecompositionMode::DataParallel;
      }
    }
    return args;
  }

  static uint64_t workspace(const Gemm& g, int device, int multiprocessors) {
    return Device::get_workspace_size(arguments(g, device, multiprocessors));
  }

  static void run(const Gemm& g, int device, int multiprocessors, void* workspace, cudaStream_t stream) {
    Device op;
    const auto status = op.run(arguments(g, device, multiprocessors), workspace, stream);
    check_launch("matrix product");
    if (status != cutlass::Status::kSuccess) {
      throw Error(LEMO_BACKEND_ERROR, std::string("matrix product: ") + cutlassGetStatusString(status));
    }
  }
};

template <class Element>
GemmKernels kernels() {
  GemmKernels table;
  table.workspace = [](const Gemm& g, int device, int sms) {
    switch (g.kind) {
      case GemmKind::kNT:
        return Kernel<Element, GemmKind::kNT>::workspace(g, device, sms);
      case GemmKind::kNN:
        return Kernel<Element, GemmKind::kNN>::workspace(g, device, sms);
      default:
        return Kernel<Element, GemmKind::kTN>::workspace(g, device, sms);
    }
  };
  table.run = [](const Gemm& g, int device, int sms, void* workspace, cudaStream_t stream) {
    switch (g.kind) {
      case GemmKind::kNT:
        return Kernel<Element, GemmKind::kNT>::run(g, device, sms, workspace, stream);
      case GemmKind::kNN:
        return Kernel<Element, GemmKind::kNN>::run(g, device, sms, workspace, stream);
      default:
        return Kernel<Element, GemmKind::kTN>::run(g, device, sms, workspace, stream);
    }
  };
  return table;
}

}  // namespace lemo::cuda::sm90
