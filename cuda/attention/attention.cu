// The attention entries of the backend table: arguments to kernel parameters, workspace, choice of the kernel.
#include <cmath>
#include <string>
#include <type_traits>

#include "attention/params.h"
#include "common/check.h"
#include "common/launch.h"
#include "common/sm90/padded_head_dim.h"
#include "kernels.h"
#include "src/key_rows.h"

namespace lemo::cuda {
namespace {

using attention::BackwardParams;
using attention::ForwardParams;
using attention::ScoreOptions;
using attention::TileLists;

TensorView view_of(const lemo_tensor& tensor) { return {tensor.data, tensor.stride[0], tensor.stride[1]}; }

// Both sides of either pass's documents. No data is read, so that workspace sizes can ask too.
template <class Args>
Documents queries_of(const Args& args) {
  return {static_cast<const int32_t*>(args.cu_seqlens.data), data<const int32_t>(args.rows),
          static_cast<int32_t>(args.cu_seqlens.shape[0] - 1), args.lse.shape[1], key_rows(args).separate};
}
template <class Args>
Documents keys_of(const Args& args) {
  const KeyRows keys = key_rows(args);
  return {static_cast<const int32_t*>(keys.cu_seqlens.data), data<const int32_t>(keys.rows),
          static_cast<int32_t>(keys.cu_seqlens.shape[0] - 1), keys.capacity, false};
}

bool no_pairs(const Documents& queries, const Documents& keys) {
  return queries.count <= 0 || queries.capacity <= 0 || keys.capacity <= 0;
}

[[noreturn]] void unsupported(const char* operation, const std::string& what) {
  throw Error(LEMO_UNSUPPORTED, std::string(operation) + ": " + what);
}

// What the rules for arguments allow and no kernel computes. Before anything is written.
template <class Args>
void check_supported(const char* operation, const Args& args) {
  // The running maximum is kept in units of q.k, which a negative scale would turn into a minimum.
  if (!std::isfinite(args.scale) || args.scale < 0.0f) {
    unsupported(operation, "scale: expected a finite value >= 0, got " + std::to_string(args.scale));
  }
  with_head_dim<true>(operation, args.q.shape[2], [](auto) {});
}

// Whether the sm_90a kernels are used: if both the build and the device have them. LEMO_CUDA_CAPABILITY=80 turns them
// off.
bool use_sm90(const lemo_exec& exec) {
#ifdef LEMO_CUDA_SM90
  return device_info(exec.device_index).capability == 90;
#else
  (void)exec;
  return false;
#endif
}

template <class Args>
TileLists lists_of(const Args& args) {
  return {data<const int32_t>(args.tile_offsets), data<const int32_t>(args.tiles)};
}

template <class Args>
ScoreOptions options_of(const Args& args) {
  const auto* places = data<const int32_t>(present(args.places) ? args.places : args.rows);
  const auto* key_places = key_rows(args).separate ? data<const int32_t>(args.places_k) : places;
  return {args.window > INT32_MAX ? 0 : args.window, places, key_places, args.softcap};  // no place is that far away
}

// The kernels of sm90/ have soft-caps and head_dim 256 without tile lists; and the backward pass at head_dim 256
// neither adds in a fixed order nor weighs keys.
template <class Args>
bool use_sm90(const lemo_exec& exec, const Args& args) {
  if (!use_sm90(exec)) return false;
  const int64_t head_dim = args.q.shape[2];
  const bool listed = present(args.tile_offsets);
  if (head_dim <= 128) return args.softcap == 0.0f || (head_dim == attention::sm90::kSoftcapHeadDim && !listed);
  if constexpr (std::is_same_v<Args, lemo_attention_backward_args>) {
    if (exec.deterministic != 0 || present(args.key_weights)) return false;
  }
  return !listed;
}

// For the kernels of sm90/: those for a soft-cap or head_dim 256 always have a window, if need be one that hides
// nothing.
template <class Args>
ScoreOptions sm90_options(const Args& args) {
  ScoreOptions options = options_of(args);
  if (options.window == 0 && (options.softcap > 0.0f || args.q.shape[2] > 128)) options.window = int64_t{1} << 32;
  return options;
}

// If sm80/ computes a pass: whether by its kernels with options.
template <class Args>
bool use_options(const Args& args) {
  return options_of(args).present() || args.q.shape[2] > 128;
}

// Whether the forward kernel adds sinks itself. Those that do are of sm90/, where every row is in a tile (blank rows
// are in none), and either have a window or the head_dim of gpt-oss; after all others, a pass over the outputs does.
bool kernel_adds_sinks(const lemo_exec& exec, const lemo_attention_forward_args& args) {
  return present(args.sinks) && use_sm90(exec, args) && !key_rows(args).separate && !present(args.tile_offsets) &&
         (sm90_options(args).window != 0 || args.q.shape[2] == attention::sm90::kSinksHeadDim);
}

int64_t list_capacity(const lemo_tensor& tiles) { return present(tiles) ? tiles.shape[0] : 0; }

struct ForwardWorkspace {
  int* counter;
  int32_t* edges;
  uint64_t bytes;
};

ForwardWorkspace forward_workspace(const lemo_exec& exec, const lemo_attention_forward_args& args, void* base) {
  Arena arena(base);
  ForwardWorkspace workspace{};
  if (use_sm90(exec, args)) {
    workspace.counter = arena.take<int>(Size(1));
    if (sm90_options(args).window != 0) workspace.edges = arena.take<int32_t>(Size(args.lse.shape[1]));
  }
  workspace.bytes = arena.size();
  return workspace;
}

struct BackwardWorkspace {
  float* delta;
  float* dq_float;
  int32_t* query_list_offsets;
  int32_t* query_list_tiles;
  uint64_t bytes;
};

BackwardWorkspace backward_workspace(const lemo_exec& exec, const lemo_attention_backward_args& args, void* base) {
  const int64_t heads = args.q.shape[1], capacity = args.lse.shape[1];
  // Refuses sizes that would overflow before the layouts multiply them: for every row of a head more bytes than any
  // layout keeps, and as many rows as tiles of 128 can hold, with one more tile per document if one may be cut.
  const int64_t spare = key_rows(args).separate ? 2 : 1;
  const Size rows =
      Size(capacity) + Size(args.cu_seqlens.shape[0]) * (spare * LEMO_TILE_ROWS) + list_capacity(args.tiles);
  (rows * heads * (Size(args.q.shape[2]) + 256)).bytes("exec.workspace", 8);
#ifdef LEMO_CUDA_SM90
  if (use_sm90(exec, args)) {
    BackwardWorkspace workspace{};
    with_head_dim<true>("attention_backward", args.q.shape[2], [&](auto head_dim) {
      constexpr int kHeadDim = decltype(head_dim)::value;
      workspace.bytes = static_cast<uint64_t>(attention::sm90::backward_workspace<sm90::padded_head_dim(kHeadDim)>(
          {queries_of(args), heads, args.k.shape[1], exec.deterministic != 0, present(args.tile_offsets),
           list_capacity(args.tiles), sm90_options(args).window != 0, keys_of(args).capacity}));
    });
    return workspace;
  }
#endif
  Arena arena(base);
  BackwardWorkspace workspace{};
  workspace.delta = arena.take<float>(Size(heads) * capacity);
  if (!exec.deterministic) {
    workspace.dq_float = arena.take<float>(Size(capacity) * heads * args.q.shape[2]);
  } else if (present(args.tile_offsets)) {
    workspace.query_list_offsets = arena.take<int32_t>(Size(args.tile_offsets.shape[0]));
    workspace.query_list_tiles = arena.take<int32_t>(Size(list_capacity(args.tiles)));
  }
  workspace.bytes = arena.size();
  return workspace;
}

#ifdef LEMO_CUDA_SM90
void run_forward_sm90(const lemo_exec& exec, const lemo_attention_forward_args& args, ForwardParams params) {
  const cudaStream_t stream = stream_of(exec);
  params.options = sm90_options(args);
  with_head_dim<true>("attention_forward", args.q.shape[2], [&](auto head_dim) {
    constexpr int kHeadDim = sm90::padded_head_dim(decltype(head_dim)::value);
    if constexpr (kHeadDim == attention::sm90::kSoftcapHeadDim || kHeadDim == 256) {
      if (params.options.softcap > 0.0f) {
        return attention::sm90::launch_forward_softcap<kHeadDim>(params, args.q.dtype, stream);
      }
    }
    if (kHeadDim == 256 || params.options.window != 0) {
      return attention::sm90::launch_forward_window<kHeadDim>(params, args.q.dtype, stream);
    }
    if constexpr (kHeadDim == attention::sm90::kSinksHeadDim) {
      if (params.sinks != nullptr) {
        return attention::sm90::launch_forward_sinks<kHeadDim>(params, args.q.dtype, stream);
      }
    }
    if constexpr (kHeadDim != 256) attention::sm90::launch_forward<kHeadDim>(params, args.q.dtype, stream);
  });
}

void run_backward_sm90(const lemo_exec& exec, const lemo_attention_backward_args& args, BackwardParams params) {
  const cudaStream_t stream = stream_of(exec);
  params.options = sm90_options(args);
  with_head_dim<true>("attention_backward", args.q.shape[2], [&](auto head_dim) {
    constexpr int kHeadDim = sm90::padded_head_dim(decltype(head_dim)::value);
    if constexpr (kHeadDim == attention::sm90::kSoftcapHeadDim || kHeadDim == 256) {
      if (params.options.softcap > 0.0f) {
        return attention::sm90::launch_backward_softcap<kHeadDim>(params, args.q.dtype, stream);
      }
    }
    if (kHeadDim == 256 || params.options.window != 0) {
      return attention::sm90::launch_backward_window<kHeadDim>(params, args.q.dtype, stream);
    }
    if constexpr (kHeadDim != 256) attention::sm90::launch_backward<kHeadDim>(params, args.q.dtype, stream);
  });
}
#endif

void run_forward(const lemo_exec& exec, const lemo_attention_forward_args& args, const ForwardParams& params) {
  constexpr const char* kName = "attention_forward";
#ifdef LEMO_CUDA_SM90
  if (use_sm90(exec, args)) return run_forward_sm90(exec, args, params);
#endif
  if (use_options(args)) {
    return with_head_dim<true>(kName, args.q.shape[2], [&](auto head_dim) {
      attention::sm80::launch_forward_options<decltype(head_dim)::value>(params, args.q.dtype, stream_of(exec));
    });
  }
  with_head_dim(kName, args.q.shape[2], [&](auto head_dim) {
    attention::sm80::launch_forward<decltype(head_dim)::value>(params, args.q.dtype, stream_of(exec));
  });
}

void run_backward(const lemo_exec& exec, const lemo_attention_backward_args& args, const BackwardParams& params) {
  constexpr const char* kName = "attention_backward";
#ifdef LEMO_CUDA_SM90
  if (use_sm90(exec, args)) return run_backward_sm90(exec, args, params);
#endif
  if (use_options(args)) {
    return with_head_dim<true>(kName, args.q.shape[2], [&](auto head_dim) {
      attention::sm80::launch_backward_options<decltype(head_dim)::value>(params, args.q.dtype, stream_of(exec));
    });
  }
  with_head_dim(kName, args.q.shape[2], [&](auto head_dim) {
    attention::sm80::launch_backward<decltype(head_dim)::value>(params, args.q.dtype, stream_of(exec));
  });
}

}  // namespace

void attention_forward(const lemo_exec& exec, const lemo_attention_forward_args& args) {
  constexpr const char* kName = "attention_forward";
  check_supported(kName, args);
  ForwardParams params{};
  params.q = view_of(args.q);
  params.k = view_of(args.k);
  params.v = view_of(args.v);
  params.out = view_of(args.out);
  params.lse = static_cast<float*>(args.lse.data);
  params.lse_stride = args.lse.stride[0];
  params.documents = queries_of(args);
  params.key_documents = keys_of(args);
  params.heads = static_cast<int32_t>(args.q.shape[1]);
  params.group = static_cast<int32_t>(args.q.shape[1] / args.k.shape[1]);
  params.head_dim = static_cast<int32_t>(args.q.shape[2]);
  params.storage_rows = args.q.shape[0];
  params.key_storage_rows = args.k.shape[0];
  params.scale = args.scale;
  params.options = options_of(args);
  const ForwardWorkspace workspace = forward_workspace(exec, args, exec.workspace);
  params.counter = workspace.counter;
  params.edges = workspace.edges;
  const bool sinks_left = present(args.sinks) && !kernel_adds_sinks(exec, args);
  params.sinks = sinks_left ? nullptr : data<const float>(args.sinks);
  params.lists = lists_of(args);
  DeviceGuard guard(exec.device_index);
  if (params.documents.aligned) {
    const attention::BlankRows blank = {params.documents, params.key_documents, false,      {params.out, {}},
                                        params.heads,     params.head_dim,      params.lse, params.lse_stride};
    attention::launch_blank_rows(blank, stream_of(exec));
  }
  if (!no_pairs(params.documents, params.key_documents)) run_forward(exec, args, params);
  if (sinks_left) {
    attention::launch_add_sinks({data<const float>(args.sinks), params.out, params.lse, params.lse_stride,
                                 params.documents, params.heads, params.head_dim},
                                args.q.dtype, stream_of(exec));
  }
}

uint64_t attention_forward_workspace(const lemo_exec& exec, const lemo_attention_forward_args& args) {
  return forward_workspace(exec, args, nullptr).bytes;
}

void attention_backward(const lemo_exec& exec, const lemo_attention_backward_args& args) {
  constexpr const char* kName = "attention_backward";
  check_supported(kName, args);
  BackwardParams params{};
  params.dout = view_of(args.dout);
  params.q = view_of(args.q);
  params.k = view_of(args.k);
  params.v = view_of(args.v);
  params.out = view_of(args.out);
  params.dq = view_of(args.dq);
  params.dk = view_of(args.dk);
  params.dv = view_of(args.dv);
  params.lse = static_cast<const float*>(args.lse.data);
  params.lse_stride = args.lse.stride[0];
  params.documents = queries_of(args);
  params.key_documents = keys_of(args);
  params.key_weights = data<const float>(args.key_weights);
  if (present(args.key_weights)) {
    params.row_slots = data<const int32_t>(args.row_slots);
    params.key_row_slots = params.documents.aligned ? data<const int32_t>(args.row_slots_k) : params.row_slots;
  }
  params.heads = static_cast<int32_t>(args.q.shape[1]);
  params.key_heads = static_cast<int32_t>(args.k.shape[1]);
  params.group = params.heads / params.key_heads;
  params.scale = args.scale;
  params.options = options_of(args);
  params.storage_rows = args.q.shape[0];
  params.key_storage_rows = args.k.shape[0];
  params.head_dim = static_cast<int32_t>(args.q.shape[2]);
  params.deterministic = exec.deterministic != 0;
  params.workspace = exec.workspace;
  params.lists = lists_of(args);
  params.list_capacity = list_capacity(args.tiles);
  DeviceGuard guard(exec.device_index);
  if (params.documents.aligned) {
    using attention::BlankRows;
    const Documents &queries = params.documents, &keys = params.key_documents;
    const int32_t dim = params.head_dim;
    attention::launch_blank_rows({queries, keys, false, {params.dq, {}}, params.heads, dim, nullptr, 0},
                                 stream_of(exec));
    attention::launch_blank_rows({keys, queries, true, {params.dk, params.dv}, params.key_heads, dim, nullptr, 0},
                                 stream_of(exec));
  }
  if (present(args.dsinks)) {
    attention::launch_sink_gradient(
        {data<const float>(args.sinks), params.dout, params.out, params.lse, params.lse_stride, params.documents,
         params.heads, params.head_dim, static_cast<float*>(args.dsinks.data)},
        args.q.dtype, stream_of(exec));
  }
  if (no_pairs(params.documents, params.key_documents)) return;
  const BackwardWorkspace workspace = backward_workspace(exec, args, exec.workspace);
  params.delta = workspace.delta;
  params.dq_float = workspace.dq_float;
  params.query_list_offsets = workspace.query_list_offsets;
  params.query_list_tiles = workspace.query_list_tiles;
  run_backward(exec, args, params);
}

uint64_t attention_backward_workspace(const lemo_exec& exec, const lemo_attention_backward_args& args) {
  return backward_workspace(exec, args, nullptr).bytes;
}

}  // namespace lemo::cuda
