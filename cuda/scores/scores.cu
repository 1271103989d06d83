// The scores entry of the backend table, and the sum over splits.
#include <string>

#include "cuda/common/check.h"
#include "cuda/kernels.h"
#include "params.h"

namespace lemo::cuda {
namespace {

using scoring::Params;

// scores[n] = sum of the partial sums, in a fixed order.
__global__ void finish_kernel(const __grid_constant__ Params params) {
  const int block = blockIdx.x * blockDim.x + threadIdx.x;
  if (block >= params.block_count) return;
  float sum = 0.0f;
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

int splits_of(const lemo_scores_args& args) {
  const int64_t blocks = args.blocks.offsets.shape[0] - 1, documents = args.blocks.documents.shape[0] - 1;
  return scoring::split_count(scoring::key_unit_slots(blocks, documents, args.blocks.block_size));
}

}  // namespace

uint64_t scores_workspace(const lemo_exec&, const lemo_scores_args& args) {
  const int64_t blocks = args.blocks.offsets.shape[0] - 1;
  if (blocks <= 0) return 0;
  Arena arena(nullptr);
  arena.take<float>(blocks * splits_of(args));
  return arena.size();
}

void scores(const lemo_exec& exec, const lemo_scores_args& args) {
  if (args.blocks.block_size > scoring::kMaxBlock) {
    throw Error(LEMO_UNSUPPORTED, "scores: blocks.block_size: expected at most " + std::to_string(scoring::kMaxBlock) +
                                      ", got " + std::to_string(args.blocks.block_size));
  }
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
  params.map_stride = args.map.stride[0];
  if (params.block_count <= 0) return;
  params.splits = splits_of(args);
  params.partial = static_cast<float*>(exec.workspace);

  void (*launch)(const Params&, int32_t, cudaStream_t) = nullptr;
  switch (args.q.shape[2]) {
    case 64:
      launch = scoring::launch_scores<64>;
      break;
    case 128:
      launch = scoring::launch_scores<128>;
      break;
#ifdef LEMO_CUDA_ALL_KERNELS
    case 80:
      launch = scoring::launch_scores<80>;
      break;
    case 96:
      launch = scoring::launch_scores<96>;
      break;
#endif
    default:
      throw Error(LEMO_UNSUPPORTED,
                  "scores: q: this build has CUDA kernels for head_dim 64 and 128"
#ifdef LEMO_CUDA_ALL_KERNELS
                  ", 80 and 96"
#endif
                  ", got " +
                      std::to_string(args.q.shape[2]));
  }
  DeviceGuard guard(exec.device_index);
  const cudaStream_t stream = stream_of(exec);
  launch(params, args.q.dtype, stream);
  constexpr int kThreads = 256;
  finish_kernel<<<(params.block_count + kThreads - 1) / kThreads, kThreads, 0, stream>>>(params);
  check_launch("scores");
}

}  // namespace lemo::cuda
