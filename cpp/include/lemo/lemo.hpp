/** @file
 * The C interface for C++17: exceptions, tensor views, one `run` for every operation. Header only.
 *
 *   std::vector<float> x(T * d), packed(M * d);
 *   auto args = lemo::make<lemo_gather_args>();
 *   args.x = lemo::view(x.data(), {T, d});
 *   args.rows = lemo::view(rows.data(), {M});
 *   args.out = lemo::view(packed.data(), {M, d});
 *   lemo::run(lemo::cpu(), args);                                  // throws lemo::Exception */
#ifndef LEMO_LEMO_HPP
#define LEMO_LEMO_HPP

#include <cstddef>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "lemo/lemo.h"
#include "lemo/operations.h"

namespace lemo {

class Exception : public std::runtime_error {
 public:
  Exception(lemo_status status, const std::string& message) : std::runtime_error(message), status_(status) {}
  lemo_status status() const noexcept { return status_; }

 private:
  lemo_status status_;
};

inline void check(lemo_status status) {
  if (status == LEMO_OK) return;
  const std::string message = lemo_last_error();
  throw Exception(status, message.empty() ? lemo_status_string(status) : message);
}

/* A zeroed argument struct with struct_size set: every optional field absent. */
template <class Args>
Args make() {
  static_assert(std::is_trivial<Args>::value, "an argument struct of the C interface");
  Args args = {};
  args.struct_size = sizeof(Args);
  return args;
}

/* Execution on the CPU; 0 threads = all cores. */
inline lemo_exec cpu(int32_t num_threads = 0) {
  auto exec = make<lemo_exec>();
  exec.num_threads = num_threads;
  return exec;
}

/* Execution on a CUDA device and stream (a cudaStream_t). The caller sets workspace and workspace_size. */
inline lemo_exec cuda(int32_t device_index, void* stream) {
  auto exec = make<lemo_exec>();
  exec.device = LEMO_CUDA;
  exec.device_index = device_index;
  exec.stream = stream;
  return exec;
}

/* A view of contiguous (row-major) or strided memory; strides count elements. */
inline lemo_tensor view(const void* data, lemo_dtype dtype, std::initializer_list<int64_t> shape,
                        std::initializer_list<int64_t> stride = {}) {
  if (shape.size() == 0 || shape.size() > LEMO_MAX_DIMS || (stride.size() != 0 && stride.size() != shape.size())) {
    throw Exception(LEMO_INVALID_ARGUMENT, "view: expected 1 to 4 dimensions and as many strides or none");
  }
  lemo_tensor t = {};
  t.data = const_cast<void*>(data);
  t.dtype = dtype;
  t.ndim = static_cast<int32_t>(shape.size());
  int64_t contiguous = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    t.shape[i] = shape.begin()[i];
    t.stride[i] = stride.size() != 0 ? stride.begin()[i] : contiguous;
    contiguous *= t.shape[i];
  }
  return t;
}
inline lemo_tensor view(const float* data, std::initializer_list<int64_t> shape) { return view(data, LEMO_F32, shape); }
inline lemo_tensor view(const int32_t* data, std::initializer_list<int64_t> shape) {
  return view(data, LEMO_I32, shape);
}
inline lemo_tensor view(const int64_t* data, std::initializer_list<int64_t> shape) {
  return view(data, LEMO_I64, shape);
}

namespace detail {

using NoWorkspace = std::nullptr_t;

/* Calls the operation; on the CPU the workspace it asks for is allocated here unless the caller gave one. */
template <class Args, class Run, class Workspace>
void call(lemo_exec exec, const Args& args, Run run, Workspace workspace) {
  std::vector<unsigned char> memory;
  if constexpr (!std::is_same<Workspace, NoWorkspace>::value) {
    if (exec.device == LEMO_CPU && exec.workspace == nullptr) {
      constexpr uint64_t alignment = 256;
      uint64_t bytes = 0;
      check(workspace(&exec, &args, &bytes));
      memory.resize(bytes + alignment);
      const auto start = reinterpret_cast<uintptr_t>(memory.data());
      exec.workspace = memory.data() + (alignment - start % alignment) % alignment;
      exec.workspace_size = bytes;
    }
  }
  check(run(&exec, &args));
}

}  // namespace detail

/* run(exec, args) for the argument struct of every operation. */
#define LEMO_DEFINE_RUN_(op)                                             \
  inline void run(const lemo_exec& exec, const lemo_##op##_args& args) { \
    detail::call(exec, args, lemo_##op, detail::NoWorkspace());          \
  }
#define LEMO_DEFINE_RUN_WITH_WORKSPACE_(op)                              \
  inline void run(const lemo_exec& exec, const lemo_##op##_args& args) { \
    detail::call(exec, args, lemo_##op, lemo_##op##_workspace);          \
  }
LEMO_OPERATIONS(LEMO_DEFINE_RUN_, LEMO_DEFINE_RUN_WITH_WORKSPACE_)
#undef LEMO_DEFINE_RUN_WITH_WORKSPACE_
#undef LEMO_DEFINE_RUN_

}  // namespace lemo

#endif
