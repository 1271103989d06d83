// The kernels of one backward pass.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attention/sm90/backward_kernel.cuh"
#include "attention/sm90/backward_rows.cuh"
#include "attention/sm90/window_edges.h"
#include "common/launch.h"

namespace lemo::cuda::attention::sm90 {

// The fewest thread blocks of a section per multiprocessor, as a ratio: about two. Causal tiles then pair up, a heavy
// one with a light one, so that all end together, and no more heads than that share the L2 cache. It is a little below
// two so that two heads of 16K tokens (2 * 129 key tiles) suffice on 132 multiprocessors.
constexpr int64_t kSectionBlocks = 19, kPerMultiprocessors = 10;
// With tile lists, whose lengths differ more, the last section would end too unevenly with a single head. Not in
// deterministic mode: walks then do not seek what the L2 cache holds, and two heads need too much of it.
constexpr int kLeastListed = 2;

// The key heads of a section. Sections are equal: a smaller last one would begin its heaviest tiles when the others are
// done.
inline int section_key_heads(int64_t key_slots, int key_heads, int64_t multiprocessors, int least) {
  for (int heads = least; heads < key_heads; ++heads) {
    if (key_heads % heads == 0 && kPerMultiprocessors * heads * key_slots >= kSectionBlocks * multiprocessors) {
      return heads;
    }
  }
  return key_heads;
}

template <int kHeadDim>
BackwardKernelParams backward_kernel_params(const BackwardParams& params, const BackwardLayout& layout, int32_t dtype) {
  constexpr int kColumns = kBoxColumns<kHeadDim>;
  const Documents& documents = params.documents;
  const auto tensor = [&](const TensorView& view, int64_t storage_rows, int heads) {
    return make_row_tensor(view, storage_rows, heads, params.head_dim, kColumns, dtype);
  };
  BackwardKernelParams kernel_params{};
  kernel_params.q = tensor(params.q, params.storage_rows, params.heads);
  kernel_params.k = tensor(params.k, params.key_storage_rows, params.key_heads);
  kernel_params.v = tensor(params.v, params.key_storage_rows, params.key_heads);
  kernel_params.dout = tensor(params.dout, params.storage_rows, params.heads);
  kernel_params.out_view = params.out;
  kernel_params.dout_view = params.dout;
  kernel_params.dq = params.dq;
  kernel_params.dk = params.dk;
  kernel_params.dv = params.dv;
  kernel_params.lse = params.lse;
  kernel_params.lse_stride = params.lse_stride;
  kernel_params.documents = documents;
  kernel_params.key_documents = params.key_documents;
  kernel_params.lists = params.lists;
  kernel_params.key_weights = params.key_weights;
  kernel_params.row_slots = params.row_slots;
  kernel_params.key_row_slots = params.key_row_slots;
  kernel_params.heads = params.heads;
  kernel_params.key_heads = params.key_heads;
  kernel_params.group = params.group;
  kernel_params.head_dim = params.head_dim;
  kernel_params.scale = params.scale;
  const float softcap = params.options.softcap;
  kernel_params.scale_log2 = (softcap > 0.0f ? softcap : params.scale) * kLog2E;
  if (softcap > 0.0f) kernel_params.tanh_factor = 2.0f * kLog2E * params.scale / softcap;
  char* workspace = static_cast<char*>(params.workspace);
  kernel_params.dq_sums = reinterpret_cast<float*>(workspace);
  kernel_params.stats = reinterpret_cast<float*>(workspace + layout.stats);
  kernel_params.sweeps = reinterpret_cast<unsigned long long*>(workspace + layout.sweeps);
  const auto ints = [&](int64_t offset) { return reinterpret_cast<int*>(workspace + offset); };
  kernel_params.turns = params.deterministic ? ints(layout.turns) : nullptr;
  const bool window = params.options.window != 0;
  kernel_params.edges = window ? ints(layout.edges) : nullptr;
  kernel_params.first_tiles = window && params.deterministic ? ints(layout.first_tiles) : nullptr;
  kernel_params.visits = reinterpret_cast<unsigned*>(workspace + layout.visits);
  kernel_params.plan = reinterpret_cast<BackwardPlan*>(workspace + layout.plan);
  kernel_params.units = reinterpret_cast<BackwardUnit*>(workspace + layout.units);
  kernel_params.max_units = static_cast<int>(layout.max_units);
  kernel_params.partials = reinterpret_cast<float*>(workspace + layout.partials);
  kernel_params.arrived = ints(layout.arrived);
  kernel_params.begins = params.lists.offsets != nullptr && params.deterministic ? ints(layout.begins) : nullptr;
  kernel_params.first_units = ints(layout.first_units);
  kernel_params.ranks = ints(layout.ranks);
  kernel_params.list_capacity = params.list_capacity;

  kernel_params.key_slots = static_cast<int>(tile_slots(params.key_documents, kBackwardKeys));
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const int multiprocessors = device_info(device).multiprocessors;
  kernel_params.multiprocessors = std::min(multiprocessors, kPlannedMultiprocessors);
  const bool seeks = params.lists.offsets != nullptr && !params.deterministic;
  kernel_params.section =
      section_key_heads(kernel_params.key_slots, params.key_heads, multiprocessors, seeks ? kLeastListed : 1);
  return kernel_params;
}

// kWindow, kSoftCap: whether there is a window, and a soft-cap.
template <typename T, int kHeadDim, bool kWindow = false, bool kSoftCap = false>
void run_backward(const BackwardParams& params, int32_t dtype, cudaStream_t stream) {
  const bool listed = params.lists.offsets != nullptr;
  const BackwardLayout layout =
      backward_layout<kHeadDim>({params.documents, params.heads, params.key_heads, params.deterministic, listed,
                                 params.list_capacity, kWindow, params.key_documents.capacity});
  const BackwardKernelParams kernel_params = backward_kernel_params<kHeadDim>(params, layout, dtype);
  const dim3 tiles(static_cast<unsigned>(layout.slots * params.heads));
  const unsigned planners = kernel_params.begins != nullptr ? 1 : 0;
  if (listed) launch_backward_plan(kernel_params, stream);
  if constexpr (kWindow) {
    launch_window_edges("attention_backward",
                        {params.documents, params.key_documents, params.options, true, kernel_params.edges}, stream);
  }
  launch("attention_backward", backward_stats_kernel<T, kHeadDim>, tiles.x + planners, kTileThreads, 0, stream,
         kernel_params);
  if (planners > 0) launch_backward_ranks(kernel_params, stream);
  const auto launch_keys = [&](auto weighted, auto visits) {
    constexpr bool kWeighted = decltype(weighted)::value;
    constexpr Visits kVisits = decltype(visits)::value;
    launch("attention_backward", backward_kernel_sm90<T, kHeadDim, kWeighted, kVisits, kSoftCap>,
           static_cast<unsigned>((kVisits == Visits::kListed ? kernel_params.max_units : kernel_params.key_slots) *
                                 params.key_heads),
           (kBackwardConsumers + 1) * 128,
           static_cast<int>(sizeof(typename BackwardMainloop<T, kHeadDim, kWeighted, kVisits, kSoftCap>::Shared)),
           stream, kernel_params);
  };
  const auto choose_visits = [&](auto with_weights) {
    if constexpr (kWindow) {
      launch_keys(with_weights, std::integral_constant<Visits, Visits::kWindow>{});
    } else if (listed) {
      launch_keys(with_weights, std::integral_constant<Visits, Visits::kListed>{});
    } else {
      launch_keys(with_weights, std::integral_constant<Visits, Visits::kAll>{});
    }
  };
  if (params.key_weights != nullptr) {
    choose_visits(std::true_type{});
  } else {
    choose_visits(std::false_type{});
  }
  launch("attention_backward", backward_dq_kernel<T, kHeadDim>, tiles, kTileThreads, 0, stream, kernel_params);
}

}  // namespace lemo::cuda::attention::sm90
