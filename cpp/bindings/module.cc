// lemo._C: the C interface as Python functions. No torch: tensors arrive as plain descriptions of memory.
#include <pybind11/pybind11.h>

#include <string>
#include <type_traits>

#include "lemo/lemo.h"

namespace py = pybind11;

namespace {

constexpr const char* kDoc = R"(The C interface of lemo, one function per operation.

    _C.<op>(exec, allocate, *fields) -> None

exec      (device, device_index, stream, deterministic, num_threads), integers
allocate  called with a number of bytes if the operation needs a workspace; returns a tensor of that many
fields    the fields of lemo_<op>_args in the order of the header, without struct_size and reserved fields;
          lemo_blocks is spread into offsets, documents, block_size; enums and flags are integers
tensor    None (absent) or (data_ptr, lemo_dtype, shape, strides in elements)

Errors: ValueError (invalid argument), NotImplementedError (unsupported), FloatingPointError (numerical), RuntimeError
(all others), with the text of lemo_last_error(). The interpreter lock is released during a call; signals that arrive
meanwhile are handled, and what a handler raises (KeyboardInterrupt) ends the call. Outputs hold no result then.)";

// Reads positional arguments into the fields it is shown, in order.
class Reader {
 public:
  Reader(const char* op, const py::args& args) : op_(op), args_(args) {}

  template <class T>
  void operator()(const char* name, T& field) {
    if (next_ >= args_.size()) {
      throw py::type_error(std::string(op_) + ": missing argument '" + name + "' at position " + std::to_string(next_));
    }
    read(name, args_[next_++], field);
  }

  void finish() const {
    if (next_ != args_.size()) {
      throw py::type_error(std::string(op_) + ": expected " + std::to_string(next_) + " arguments, got " +
                           std::to_string(args_.size()));
    }
  }

 private:
  void read(const char* name, const py::handle& value, lemo_tensor& tensor) {
    if (value.is_none()) return;
    if (!py::isinstance<py::tuple>(value) || py::len(value) != 4) {
      throw py::type_error(std::string(op_) + ": " + name +
                           ": expected None or (data_ptr, dtype, shape, strides), got " +
                           py::repr(value).cast<std::string>());
    }
    const auto view = py::reinterpret_borrow<py::tuple>(value);
    const auto shape = view[2].cast<py::sequence>();
    const auto strides = view[3].cast<py::sequence>();
    if (shape.size() < 1 || shape.size() > LEMO_MAX_DIMS || strides.size() != shape.size()) {
      throw py::value_error(std::string(op_) + ": " + name + ": expected 1 to " + std::to_string(LEMO_MAX_DIMS) +
                            " dimensions and as many strides, got " + std::to_string(shape.size()) + " and " +
                            std::to_string(strides.size()));
    }
    tensor.data = reinterpret_cast<void*>(view[0].cast<uintptr_t>());
    tensor.dtype = view[1].cast<int32_t>();
    tensor.ndim = static_cast<int32_t>(shape.size());
    for (size_t i = 0; i < shape.size(); ++i) {
      tensor.shape[i] = shape[i].cast<int64_t>();
      tensor.stride[i] = strides[i].cast<int64_t>();
    }
  }

  template <class T>
  void read(const char* name, const py::handle& value, T& number) {
    static_assert(std::is_arithmetic<T>::value, "a tensor or a number");
    try {
      number = value.cast<T>();
    } catch (const py::cast_error&) {
      throw py::type_error(std::string(op_) + ": " + name + ": expected a number in range, got " +
                           py::repr(value).cast<std::string>());
    }
  }

  const char* op_;
  const py::args& args_;
  size_t next_ = 0;
};

// The fields of each argument struct in header order. (Lists of macros: clang-format finds no stable form for them.)
#define F(field) f(#field, a.field);
#define LEMO_BLOCKS                   \
  f("offsets", a.blocks.offsets);     \
  f("documents", a.blocks.documents); \
  f("block_size", a.blocks.block_size);

// clang-format off
template <class V>
void fields(V& f, lemo_select_args& a) {
  F(scores) LEMO_BLOCKS F(mode) F(keep) F(threshold) F(always_first) F(always_last) F(seed) F(kept) F(slots)
  F(row_offsets) F(cu_seqlens) F(rows) F(row_slots) F(weights) F(info)
}
template <class V>
void fields(V& f, lemo_scores_args& a) {
  F(q) F(k) LEMO_BLOCKS F(scale) F(normalize) F(scores) F(map)
}
template <class V>
void fields(V& f, lemo_predict_args& a) {
  F(x) F(wq1) F(wq2) F(wq3) F(wk1) F(wk2) F(wk3) LEMO_BLOCKS F(norm) F(pool) F(eps) F(normalize) F(scores) F(queries)
  F(keys)
}
template <class V>
void fields(V& f, lemo_gather_args& a) {
  F(x) F(rows) F(weights) F(slots) F(out)
}
template <class V>
void fields(V& f, lemo_scatter_add_args& a) {
  F(x) F(rows) F(y) F(base)
}
template <class V>
void fields(V& f, lemo_gather_norm_args& a) {
  F(x) F(rows) F(residual) F(weight) F(bias) F(norm) F(eps) F(y) F(packed) F(mean) F(rstd)
}
template <class V>
void fields(V& f, lemo_gather_norm_backward_args& a) {
  F(dy) F(s) F(weight) F(ds_extra) F(rows) F(norm) F(eps) F(accumulate) F(dx) F(dweight) F(dbias)
}
template <class V>
void fields(V& f, lemo_attention_forward_args& a) {
  F(q) F(k) F(v) F(cu_seqlens) F(rows) F(max_seqlen) F(scale) F(out) F(lse) F(tile_offsets) F(tiles)
  F(cu_seqlens_k) F(rows_k) F(max_seqlen_k)
}
template <class V>
void fields(V& f, lemo_attention_backward_args& a) {
  F(dout) F(q) F(k) F(v) F(out) F(lse) F(cu_seqlens) F(rows) F(key_weights) F(row_slots) F(max_seqlen) F(scale) F(dq)
  F(dk) F(dv) F(tile_offsets) F(tiles) F(cu_seqlens_k) F(rows_k) F(row_slots_k) F(max_seqlen_k)
}
template <class V>
void fields(V& f, lemo_linear_cross_entropy_args& a) {
  F(hidden) F(weight) F(bias) F(lora_a) F(lora_b) F(targets) F(ignore_index) F(lora_scale) F(softcap) F(reduction)
  F(segment_rows) F(loss) F(valid) F(dhidden) F(dweight) F(dbias) F(dlora_a) F(dlora_b)
}
// clang-format on
#undef F
#undef LEMO_BLOCKS

constexpr uintptr_t kAlignment = 256;  // bytes, of the workspace

lemo_exec read_exec(const py::tuple& given) {
  if (given.size() != 5) {
    throw py::type_error("exec: expected (device, device_index, stream, deterministic, num_threads), got " +
                         std::to_string(given.size()) + " values");
  }
  lemo_exec exec = {};
  exec.struct_size = sizeof(exec);
  exec.device = given[0].cast<int32_t>();
  exec.device_index = given[1].cast<int32_t>();
  exec.stream = reinterpret_cast<void*>(given[2].cast<uintptr_t>());
  exec.deterministic = given[3].cast<int32_t>();
  exec.num_threads = given[4].cast<int32_t>();
  return exec;
}

template <class Args>
Args read_args(const char* op, const py::args& given) {
  Args args = {};
  args.struct_size = sizeof(args);
  Reader reader(op, given);
  fields(reader, args);
  reader.finish();
  return args;
}

// Runs without the interpreter's lock, and takes it now and then for signals that have arrived. Python calls their
// handlers on its main thread only.
class Unlocked {
 public:
  explicit Unlocked(lemo_exec& exec) : state_(PyEval_SaveThread()) {
    exec.cancel = &check_signals;
    exec.cancel_context = this;
  }
  ~Unlocked() { PyEval_RestoreThread(state_); }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  static int32_t check_signals(void* context) {
    auto* self = static_cast<Unlocked*>(context);
    PyEval_RestoreThread(self->state_);
    const int raised = PyErr_CheckSignals();
    self->state_ = PyEval_SaveThread();
    return raised;
  }

  PyThreadState* state_;
};

void raise_on_error(lemo_status status) {
  if (status == LEMO_OK) return;
  if (status == LEMO_CANCELLED && PyErr_Occurred() != nullptr) throw py::error_already_set();
  const char* message = lemo_last_error();
  PyObject* type = PyExc_RuntimeError;
  if (status == LEMO_INVALID_ARGUMENT) type = PyExc_ValueError;
  if (status == LEMO_UNSUPPORTED) type = PyExc_NotImplementedError;
  if (status == LEMO_NUMERICAL) type = PyExc_FloatingPointError;
  PyErr_SetString(type, message[0] != '\0' ? message : lemo_status_string(status));
  throw py::error_already_set();
}

template <class Args>
void define(py::module_& m, const char* op, lemo_status (*run)(const lemo_exec*, const Args*),
            lemo_status (*workspace)(const lemo_exec*, const Args*, uint64_t*) = nullptr) {
  m.def(op, [op, run, workspace](const py::tuple& given_exec, const py::object& allocate, const py::args& given) {
    lemo_exec exec = read_exec(given_exec);
    const Args args = read_args<Args>(op, given);
    py::object memory;  // held until the work is in the stream
    if (workspace != nullptr) {
      uint64_t bytes = 0;
      raise_on_error(workspace(&exec, &args, &bytes));
      if (bytes > 0) {
        memory = allocate(bytes + kAlignment);
        const auto address = memory.attr("data_ptr")().cast<uintptr_t>();
        exec.workspace = reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
        exec.workspace_size = bytes;
      }
    }
    lemo_status status;
    {
      const Unlocked unlocked(exec);
      status = run(&exec, &args);
    }
    raise_on_error(status);
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = kDoc;
  m.def("version", &lemo_version);
  m.def("has_backend", [](int device) { return lemo_has_backend(static_cast<lemo_device>(device)) != 0; });
  m.def("hash_uniform", &lemo_hash_uniform);
  define(m, "gather", &lemo_gather);
  define(m, "scatter_add", &lemo_scatter_add);
  define(m, "gather_norm", &lemo_gather_norm);
  define(m, "gather_norm_backward", &lemo_gather_norm_backward, &lemo_gather_norm_backward_workspace);
  define(m, "select", &lemo_select, &lemo_select_workspace);
  define(m, "scores", &lemo_scores, &lemo_scores_workspace);
  define(m, "predict", &lemo_predict, &lemo_predict_workspace);
  define(m, "attention_forward", &lemo_attention_forward, &lemo_attention_forward_workspace);
  define(m, "attention_backward", &lemo_attention_backward, &lemo_attention_backward_workspace);
  define(m, "linear_cross_entropy", &lemo_linear_cross_entropy, &lemo_linear_cross_entropy_workspace);
}
