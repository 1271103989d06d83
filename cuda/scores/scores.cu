// The scores entry of the backend table, and the sum over splits.
#include <string>

#include "common/check.h"
#include "common/launch.h"
#include "common/sm90/padded_head_dim.h"
#include "kernels.h"
#include "scores/params.h"
#include "scores/sm90/scores_params.h"

namespace lemo::cuda {
namespace {

using scoring::Params;

// scores[n] = sum of the partial sums, in a fixed order.
__global__ void finish_kernel(const __grid_constant__ Params params) {
  const int block = blockIdx.x * blockDim.x + threadIdx.x;
  if (block >= params.block_count) return;
  float sum = 0.0f;
#pragma unroll 8
  for (int split = 0; split < params.splits; ++split) {
    sum += params.partial[static_cast<int64_t>(split) * params.block_count + block];
  }
  if (params.normalize != 0) {
    int document = 0;
    for (int high = params.document_count - 1; document < high;) {
      const int middle = (document + high + 1) / 2;
      if (params.documents[middle] <= block) {
        document = middle;
      } else {
        high = middle - 1;
      }
    }
    sum /= static_cast<float>(params.documents[document + 1] - block);
  }
  params.scores[block] = sum;
}

// Whether the sm_90a kernel is used: if both the build and the device have it and the blocks fit its tiles. Other
// blocks (below 16, or not dividing 128) take the sm_80 kernel. LEMO_CUDA_CAPABILITY=80 turns it off.
bool use_sm90(const lemo_exec& exec, const lemo_scores_args& args) {
#ifdef LEMO_CUDA_SM90
  return device_info(exec.device_index).capability == 90 &&
         scoring::sm90::supported(args.blocks.block_size, args.scale);
#else
  (void)exec, (void)args;
  return false;
#endif
}

struct Workspace {
  int splits;
  float* partial;
  int* counter;  // of the sm_90a kernel
  uint64_t bytes;
};

Workspace layout(const lemo_exec& exec, const lemo_scores_args& args, void* base) {
  const int64_t blocks = args.blocks.offsets.shape[0] - 1, documents = args.blocks.documents.shape[0] - 1;
  const bool sm90 = use_sm90(exec, args);
  Arena arena(base);
  Workspace workspace{};
  workspace.splits = sm90 ? scoring::sm90::split_count(blocks, documents, args.blocks.block_size)
                          : scoring::split_count(scoring::key_unit_slots(blocks, documents, args.blocks.block_size));
  workspace.partial = arena.take<float>(Size(blocks) * workspace.splits);
  if (sm90) workspace.counter = arena.take<int>(1);
  workspace.bytes = arena.size();
  return workspace;
}

}  // namespace

uint64_t scores_workspace(const lemo_exec& exec, const lemo_scores_args& args) {
  if (args.blocks.offsets.shape[0] <= 1) return 0;
  return layout(exec, args, nullptr).bytes;
}

void scores(const lemo_exec& exec, const lemo_scores_args& args) {
  if (args.blocks.block_size > scoring::kMaxBlock) {
    throw Error(LEMO_UNSUPPORTED, "scores: blocks.block_size: expected at most " + std::to_string(scoring::kMaxBlock) +
                                      ", got " + std::to_string(args.blocks.block_size));
  }
  if (args.window > 0 || args.softcap > 0) {
    throw Error(LEMO_UNSUPPORTED,
                "scores: window, softcap: expected 0 on CUDA, whose kernel does not have them yet (the CPU backend "
                "does), got " +
                    std::to_string(args.window) + " and " + std::to_string(args.softcap));
  }
  with_head_dim("scores", args.q.shape[2], [](auto) {});  // refuses other sizes before anything is written
  Params params{};
  params.q = {args.q.data, args.q.stride[0], args.q.stride[1]};
  params.k = {args.k.data, args.k.stride[0], args.k.stride[1]};
  params.offsets = data<const int32_t>(args.blocks.offsets);
  params.documents = data<const int32_t>(args.blocks.documents);
  params.block_count = static_cast<int32_t>(args.blocks.offsets.shape[0] - 1);
  params.document_count = static_cast<int32_t>(args.blocks.documents.shape[0] - 1);
  params.block_size = args.blocks.block_size;
  params.heads = static_cast<int32_t>(args.q.shape[1]);
  params.group = static_cast<int32_t>(args.q.shape[1] / args.k.shape[1]);
  params.scale = args.scale;
  params.normalize = args.normalize;
  params.scores = data<float>(args.scores);
  params.map = data<float>(args.map);
  params.map_stride = row_stride(args.map);
  if (params.block_count <= 0) return;
  const Workspace workspace = layout(exec, args, exec.workspace);
  params.splits = workspace.splits;
  params.partial = workspace.partial;
  params.counter = workspace.counter;
  params.tokens = args.q.shape[0];
  params.head_dim = static_cast<int32_t>(args.q.shape[2]);
  DeviceGuard guard(exec.device_index);
  const cudaStream_t stream = stream_of(exec);
  if (params.map != nullptr) {
    check(cudaMemset2DAsync(params.map, params.map_stride * sizeof(float), 0, params.block_count * sizeof(float),
                            params.block_count, stream),
          "scores: map");
  }
  with_head_dim("scores", args.q.shape[2], [&](auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
#ifdef LEMO_CUDA_SM90
    if (params.counter != nullptr) {
      return scoring::sm90::launch_scores<sm90::padded_head_dim(kHeadDim)>(params, args.q.dtype, stream);
    }
#endif
    scoring::sm80::launch_scores<kHeadDim>(params, args.q.dtype, stream);
  });
  constexpr int kThreads = 256;
  finish_kernel<<<(params.block_count + kThreads - 1) / kThreads, kThreads, 0, stream>>>(params);
  check_launch("scores");
}

}  // namespace lemo::cuda
