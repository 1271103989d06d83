// lemo._C: the C interface as Python functions. No torch: tensors arrive as plain descriptions of memory.
#include <pybind11/pybind11.h>

#include <string>
#include <type_traits>

#include "lemo/lemo.h"
#include "src/fields.h"

namespace py = pybind11;

namespace {

constexpr const char* kDoc = R"(The C interface of lemo, one function per operation.

    _C.<op>(exec, allocate, *fields) -> None
    _C.fields      {op: ((field, role), ...)} in the order of the arguments; the roles are those of lemo/operations.h
    _C.structs     {op: ((field, type), ...)} of lemo_<op>_args after struct_size, as the header has them
    _C.constants   {name: value} of every enumerator of the headers, and of LEMO_MAX_DIMS and LEMO_TILE_ROWS

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
  void operator()(lemo::FieldRole role, const char* name, T& field) {
    if (role == lemo::FieldRole::reserved) return;
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

// The fields of a struct with lemo_blocks spread.
template <class Args, class Visitor>
void for_each_argument(Args& args, Visitor& visitor) {
  lemo::Fields<Args>::visit(args, [&](lemo::FieldRole role, const char* name, auto& field) {
    if constexpr (std::is_same_v<std::remove_reference_t<decltype(field)>, lemo_blocks>) {
      visitor(lemo::FieldRole::input, "offsets", field.offsets);
      visitor(lemo::FieldRole::input, "documents", field.documents);
      visitor(lemo::FieldRole::value, "block_size", field.block_size);
    } else {
      visitor(role, name, field);
    }
  });
}

template <class Args>
Args read_args(const char* op, const py::args& given) {
  Args args = {};
  args.struct_size = sizeof(args);
  Reader reader(op, given);
  for_each_argument(args, reader);
  reader.finish();
  return args;
}

// Releases the interpreter's lock, and takes it back now and then to handle signals that have arrived. Python calls
// their handlers on its main thread only.
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

const char* role_name(lemo::FieldRole role) {
  switch (role) {
    case lemo::FieldRole::input:
      return "input";
    case lemo::FieldRole::optional:
      return "optional";
    case lemo::FieldRole::companion:
      return "companion";
    case lemo::FieldRole::output:
      return "output";
    case lemo::FieldRole::optional_output:
      return "optional_output";
    case lemo::FieldRole::inout:
      return "inout";
    case lemo::FieldRole::value:
      return "value";
    case lemo::FieldRole::layout:
      return "layout";
    case lemo::FieldRole::reserved:
      return "reserved";
  }
  return "unknown";
}

template <class Args>
py::tuple describe_fields() {
  py::list fields;
  Args args = {};
  auto append = [&](lemo::FieldRole role, const char* name, const auto&) {
    if (role != lemo::FieldRole::reserved) fields.append(py::make_tuple(name, role_name(role)));
  };
  for_each_argument(args, append);
  return fields;
}

const char* type_name(const lemo_tensor&) { return "lemo_tensor"; }
const char* type_name(const lemo_blocks&) { return "lemo_blocks"; }
const char* type_name(int32_t) { return "int32_t"; }
const char* type_name(int64_t) { return "int64_t"; }
const char* type_name(uint64_t) { return "uint64_t"; }
const char* type_name(float) { return "float"; }

template <class Args>
py::tuple describe_struct() {
  py::list fields;
  const Args args = {};
  lemo::Fields<Args>::visit(args, [&](lemo::FieldRole, const char* name, const auto& field) {
    fields.append(py::make_tuple(name, type_name(field)));
  });
  return fields;
}

#define LEMO_CONSTANT(name) constants[#name] = static_cast<int64_t>(name);
// clang-format off
py::dict constants_of_the_headers() {
  py::dict constants;
  LEMO_CONSTANT(LEMO_OK) LEMO_CONSTANT(LEMO_INVALID_ARGUMENT) LEMO_CONSTANT(LEMO_UNSUPPORTED)
  LEMO_CONSTANT(LEMO_WORKSPACE_TOO_SMALL) LEMO_CONSTANT(LEMO_NUMERICAL) LEMO_CONSTANT(LEMO_BACKEND_ERROR)
  LEMO_CONSTANT(LEMO_INTERNAL_ERROR) LEMO_CONSTANT(LEMO_CANCELLED)
  LEMO_CONSTANT(LEMO_F32) LEMO_CONSTANT(LEMO_F16) LEMO_CONSTANT(LEMO_BF16) LEMO_CONSTANT(LEMO_I32)
  LEMO_CONSTANT(LEMO_I64) LEMO_CONSTANT(LEMO_U8)
  LEMO_CONSTANT(LEMO_CPU) LEMO_CONSTANT(LEMO_CUDA)
  LEMO_CONSTANT(LEMO_NORM_RMS) LEMO_CONSTANT(LEMO_NORM_LAYER)
  LEMO_CONSTANT(LEMO_POOL_MEAN) LEMO_CONSTANT(LEMO_POOL_MAX)
  LEMO_CONSTANT(LEMO_SELECT_THRESHOLD) LEMO_CONSTANT(LEMO_SELECT_BUDGET) LEMO_CONSTANT(LEMO_SELECT_SAMPLE)
  LEMO_CONSTANT(LEMO_SELECT_POISSON)
  LEMO_CONSTANT(LEMO_INFO_KEPT_BLOCKS) LEMO_CONSTANT(LEMO_INFO_KEPT_ROWS) LEMO_CONSTANT(LEMO_INFO_LONGEST_DOCUMENT)
  LEMO_CONSTANT(LEMO_INFO_FAULT) LEMO_CONSTANT(LEMO_INFO_SIZE)
  LEMO_CONSTANT(LEMO_REDUCE_MEAN) LEMO_CONSTANT(LEMO_REDUCE_SUM)
  LEMO_CONSTANT(LEMO_MAX_DIMS) LEMO_CONSTANT(LEMO_TILE_ROWS)
  return constants;
}
// clang-format on
#undef LEMO_CONSTANT

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
  m.attr("constants") = constants_of_the_headers();
  py::dict fields, structs;
#define LEMO_DEFINE(op)                              \
  define(m, #op, &lemo_##op);                        \
  fields[#op] = describe_fields<lemo_##op##_args>(); \
  structs[#op] = describe_struct<lemo_##op##_args>();
#define LEMO_DEFINE_WITH_WORKSPACE(op)                \
  define(m, #op, &lemo_##op, &lemo_##op##_workspace); \
  fields[#op] = describe_fields<lemo_##op##_args>();  \
  structs[#op] = describe_struct<lemo_##op##_args>();
  LEMO_OPERATIONS(LEMO_DEFINE, LEMO_DEFINE_WITH_WORKSPACE)
#undef LEMO_DEFINE_WITH_WORKSPACE
#undef LEMO_DEFINE
  m.attr("fields") = fields;
  m.attr("structs") = structs;
}
