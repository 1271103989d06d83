// The grid, the descriptors and the order of the work of one forward launch.
#pragma once

#include <algorithm>

#include "attention/sm90/forward_kernel.cuh"
#include "attention/sm90/window_edges.h"
#include "common/launch.h"

namespace lemo::cuda::attention::sm90 {

// Key heads of a section keep their keys and values within this much of the L2 cache (50 MiB on H100, 60 on H200).
constexpr int64_t kSectionBytes = 32 << 20;

inline int heads_in_cache(int64_t rows, int key_heads, int head_dim) {
  const int64_t bytes = std::max<int64_t>(1, rows * head_dim * 2 * 2);
  return static_cast<int>(std::clamp<int64_t>(kSectionBytes / bytes, 1, key_heads));
}

template <typename T, int kHeadDim, Visits kVisits, bool kSinks, bool kSoftCap = false>
void run_forward_as(const ForwardParams& params, int32_t dtype, cudaStream_t stream) {
  using Mainloop = ForwardMainloop<T, kHeadDim, kVisits, kSoftCap>;
  const Documents& documents = params.documents;
  constexpr int kColumns = kBoxColumns<kHeadDim>;
  const int key_heads = params.heads / params.group;
  ForwardKernelParams kernel_params{};
  kernel_params.q = make_row_tensor(params.q, params.storage_rows, params.heads, params.head_dim, kColumns, dtype);
  kernel_params.k = make_row_tensor(params.k, params.key_storage_rows, key_heads, params.head_dim, kColumns, dtype);
  kernel_params.v = make_row_tensor(params.v, params.key_storage_rows, key_heads, params.head_dim, kColumns, dtype);
  kernel_params.out = params.out;
  kernel_params.lse = params.lse;
  kernel_params.lse_stride = params.lse_stride;
  kernel_params.documents = documents;
  kernel_params.key_documents = params.key_documents;
  kernel_params.lists = params.lists;
  kernel_params.heads = params.heads;
  kernel_params.group = params.group;
  kernel_params.head_dim = params.head_dim;
  // A scale of 0 would turn masked scores into NaN; with this one every visible score still becomes 0.
  kernel_params.scale_log2 = std::max(params.scale * kLog2E, 1e-30f);
  if constexpr (kSoftCap) {
    kernel_params.scale_log2 = params.options.softcap * kLog2E;
    kernel_params.tanh_factor = 2.0f * kLog2E * params.scale / params.options.softcap;
  }
  if constexpr (kVisits == Visits::kWindow) {
    kernel_params.edges = params.edges;
    launch_window_edges("attention_forward", {documents, params.key_documents, params.options, false, params.edges},
                        stream);
  }
  if constexpr (kSinks) kernel_params.sinks = params.sinks;
  ForwardSchedule& schedule = kernel_params.schedule;
  schedule.next = params.counter;
  schedule.slots = static_cast<int>(query_slots<kAlignedRows>(documents, Mainloop::Order::kRows));
  schedule.section = heads_in_cache(params.key_documents.capacity, key_heads, params.head_dim);
  schedule.items = schedule.slots * key_heads * Mainloop::Order::items(params.group);

  static_assert(kAlignedRows % Mainloop::kKeys == 0);
  static_assert(sizeof(ForwardShared<Mainloop, kHeadDim>) <= 227 * 1024);
  check(cudaMemsetAsync(params.counter, 0, sizeof(int), stream), "attention_forward");
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const int blocks = std::min(schedule.items, device_info(device).multiprocessors);
  launch("attention_forward", forward_kernel_sm90<T, kHeadDim, kVisits, kSinks, kSoftCap>, blocks,
         (Mainloop::kConsumers + 1) * 128, static_cast<int>(sizeof(ForwardShared<Mainloop, kHeadDim>)), stream,
         kernel_params);
}

template <typename T, int kHeadDim>
void run_forward(const ForwardParams& params, int32_t dtype, cudaStream_t stream) {
  if (params.lists.offsets != nullptr) {
    return run_forward_as<T, kHeadDim, Visits::kListed, false>(params, dtype, stream);
  }
  run_forward_as<T, kHeadDim, Visits::kAll, false>(params, dtype, stream);
}

}  // namespace lemo::cuda::attention::sm90
