// Every entry point: guard, read the structs, validate, check the workspace, call the backend's function.
#include <algorithm>
#include <type_traits>

#include "src/backend.h"
#include "src/fields.h"
#include "src/guard.h"
#include "src/hash.h"
#include "src/validate.h"

namespace lemo {
namespace {

const Backend& backend_of(const lemo_exec& exec) {
  if (exec.device == LEMO_CPU) return cpu_backend();
#ifdef LEMO_WITH_CUDA
  if (!cuda_backend().available()) {
    throw Error(LEMO_UNSUPPORTED, "exec.device: CUDA is not usable here: no device or no driver was found");
  }
  return cuda_backend();
#else
  throw Error(LEMO_UNSUPPORTED, "exec.device: this build of lemo has no CUDA backend (build with LEMO_CUDA=ON)");
#endif
}

void check_workspace(const lemo_exec& exec, uint64_t needed) {
  if (needed == 0) return;
  if (exec.workspace == nullptr || exec.workspace_size < needed) {
    throw Error(LEMO_WORKSPACE_TOO_SMALL, "exec.workspace: expected at least " + std::to_string(needed) +
                                              " bytes, got " +
                                              std::to_string(exec.workspace == nullptr ? 0 : exec.workspace_size));
  }
  // Host allocators rarely align to more than a cache line.
  const uint64_t alignment = exec.device == LEMO_CPU ? 64 : 256;
  if (reinterpret_cast<uintptr_t>(exec.workspace) % alignment != 0) {
    throw Error(LEMO_INVALID_ARGUMENT,
                "exec.workspace: expected an address aligned to " + std::to_string(alignment) + " bytes");
  }
}

// What an empty tensor points to, so that backends may read `data == nullptr` as "absent". Allocators, torch's among
// them, give NULL for 0 elements.
alignas(256) unsigned char no_elements[256];

template <class Args>
Args read_args(const Args* given) {
  Args args = read_struct("args", given);
  const uint64_t size = args.struct_size;
  for_each_tensor(args, [&](FieldRole, const char* name, lemo_tensor& t) {
    const auto begin = static_cast<uint64_t>(reinterpret_cast<const char*>(&t) - reinterpret_cast<const char*>(&args));
    if (begin < size && size < begin + sizeof(t)) {
      throw Error(LEMO_INVALID_ARGUMENT, "args.struct_size: expected a size that ends between fields, got " +
                                             std::to_string(size) + ", which cuts `" + name + "` in two");
    }
    const int32_t dims = t.ndim < LEMO_MAX_DIMS ? t.ndim : LEMO_MAX_DIMS;
    if (dims <= 0 || std::find(t.shape, t.shape + dims, 0) == t.shape + dims) return;
    if (t.data == nullptr) t.data = no_elements;
    std::fill_n(t.stride, LEMO_MAX_DIMS, 0);  // meaningless without elements
  });
  for_each_reserved(args, [](const char* name, int32_t value) {
    if (value != 0) {
      throw Error(LEMO_INVALID_ARGUMENT, std::string("args.") + name + ": expected 0, got " + std::to_string(value) +
                                             "; zero-initialize the struct");
    }
  });
  return args;
}

template <class Args>
using Run = void (*Backend::*)(const lemo_exec&, const Args&);
template <class Args>
using Size = uint64_t (*Backend::*)(const lemo_exec&, const Args&);

template <class Args>
lemo_status run(const char* operation, const lemo_exec* given_exec, const Args* given_args, Run<Args> function,
                Size<Args> workspace = nullptr) noexcept {
  return guarded(operation, [&] {
    const lemo_exec exec = read_struct("exec", given_exec);
    const Args args = read_args(given_args);
    validate_exec(exec);
    const Backend& backend = backend_of(exec);
    validate(exec, args, Purpose::kRun);
    if (workspace != nullptr) check_workspace(exec, (backend.*workspace)(exec, args));
    (backend.*function)(exec, args);
  });
}

template <class Args>
lemo_status size(const char* operation, const lemo_exec* given_exec, const Args* given_args, uint64_t* bytes,
                 Size<Args> workspace) noexcept {
  return guarded(operation, [&] {
    const lemo_exec exec = read_struct("exec", given_exec);
    const Args args = read_args(given_args);
    if (bytes == nullptr) throw Error(LEMO_INVALID_ARGUMENT, "bytes: expected a pointer, got NULL");
    validate_exec(exec);
    const Backend& backend = backend_of(exec);
    validate(exec, args, Purpose::kWorkspace);
    *bytes = (backend.*workspace)(exec, args);
  });
}

}  // namespace
}  // namespace lemo

extern "C" {

// Every operation of the list is declared by a public header, in exactly this form.
#define LEMO_CHECK_PROTOTYPE(op) \
  static_assert(std::is_same_v<decltype(&lemo_##op), lemo_status (*)(const lemo_exec*, const lemo_##op##_args*)>);
#define LEMO_CHECK_PROTOTYPES(op)                                \
  LEMO_CHECK_PROTOTYPE(op)                                       \
  static_assert(std::is_same_v<decltype(&lemo_##op##_workspace), \
                               lemo_status (*)(const lemo_exec*, const lemo_##op##_args*, uint64_t*)>);
LEMO_OPERATIONS(LEMO_CHECK_PROTOTYPE, LEMO_CHECK_PROTOTYPES)

#define LEMO_ENTRY(op)                                                         \
  lemo_status lemo_##op(const lemo_exec* exec, const lemo_##op##_args* args) { \
    return lemo::run<lemo_##op##_args>(#op, exec, args, &lemo::Backend::op);   \
  }
#define LEMO_ENTRY_WITH_WORKSPACE(op)                                                                         \
  lemo_status lemo_##op(const lemo_exec* exec, const lemo_##op##_args* args) {                                \
    return lemo::run<lemo_##op##_args>(#op, exec, args, &lemo::Backend::op, &lemo::Backend::op##_workspace);  \
  }                                                                                                           \
  lemo_status lemo_##op##_workspace(const lemo_exec* exec, const lemo_##op##_args* args, uint64_t* bytes) {   \
    return lemo::size<lemo_##op##_args>(#op "_workspace", exec, args, bytes, &lemo::Backend::op##_workspace); \
  }
LEMO_OPERATIONS(LEMO_ENTRY, LEMO_ENTRY_WITH_WORKSPACE)

int lemo_has_backend(lemo_device device) {
  if (device == LEMO_CPU) return 1;
#ifdef LEMO_WITH_CUDA
  if (device == LEMO_CUDA) {
    int available = 0;
    lemo::guarded("has_backend", [&] { available = lemo::cuda_backend().available() ? 1 : 0; });
    return available;
  }
#endif
  return 0;
}

double lemo_hash_uniform(uint64_t seed, uint64_t index) { return lemo::hash_uniform(seed, index); }
}
