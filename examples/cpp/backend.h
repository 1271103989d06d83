// Where the trainer computes. liblemo brings the operations of token elimination for both devices; this interface adds
// what a transformer needs besides them (matrix products, rotary positions, SwiGLU, the embedding lookup), once in
// backend_cpu.cc (float32) and once in backend_cuda.cu (bfloat16). Everything above it is the same source for both.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <lemo/lemo.hpp>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

namespace trainer {

// A contiguous tensor that owns memory on the backend's device. Copies share it.
class Tensor {
 public:
  Tensor() = default;
  Tensor(std::shared_ptr<void> memory, const lemo_tensor& view) : memory_(std::move(memory)), view_(view) {}

  explicit operator bool() const { return memory_ != nullptr; }
  int64_t rows() const { return view_.shape[0]; }
  int64_t columns() const { return view_.shape[1]; }
  int64_t count() const;

  // The argument structs of liblemo take views.
  operator const lemo_tensor&() const { return view_; }  // NOLINT(google-explicit-constructor)

  // The same elements in another shape; and the first n rows.
  lemo_tensor as(std::initializer_list<int64_t> shape) const;
  lemo_tensor first(int64_t n) const;

 private:
  std::shared_ptr<void> memory_;
  lemo_tensor view_ = {};
};

int64_t element_size(int32_t dtype);
int64_t count(const lemo_tensor& tensor);

enum class Op { kPlain, kTransposed };

class Backend {
 public:
  virtual ~Backend() = default;

  // Of weights and activations: LEMO_F32 on the CPU, LEMO_BF16 on CUDA.
  lemo_dtype dtype() const { return dtype_; }

  // Uninitialized memory.
  Tensor make(std::initializer_list<int64_t> shape, lemo_dtype dtype);
  Tensor make(std::initializer_list<int64_t> shape) { return make(shape, dtype_); }

  // Host memory to and from the device, element for element. `download` waits for the device.
  virtual void upload(const lemo_tensor& to, const void* from) = 0;
  virtual void download(void* to, const lemo_tensor& from) = 0;

  virtual void zero(const lemo_tensor& tensor) = 0;

  // Uploads and downloads with floats on the host, whatever the tensor's dtype.
  void upload_floats(const lemo_tensor& to, const float* from);
  std::vector<float> download_floats(const lemo_tensor& from);

  // An operation of liblemo. lemo::run brings a workspace on the CPU only; here each device has one that grows to what
  // the most demanding operation asks for.
  template <class Args>
  void run(const Args& args);

  // out [m, n] = alpha op(a) op(b) + beta out. a and b have the backend's dtype, out that or float32.
  virtual void matmul(const lemo_tensor& out, float alpha, const lemo_tensor& a, Op op_a, const lemo_tensor& b, Op op_b,
                      float beta) = 0;

  // out[i] = table[tokens[i]]. table [V, d], tokens int32 [n], out [n, d]
  virtual void embed(const lemo_tensor& out, const lemo_tensor& table, const lemo_tensor& tokens) = 0;

  // Rotates pairs (c, c + D/2) of x [M, H, D] in place by direction * angle; row i stands at positions[i].
  // angles: float32 [T, D], cosines in the first half of a row and sines in the second; direction: +1, or -1 for the
  // backward pass: the gradient of a rotation is the rotation back.
  virtual void rotate(const lemo_tensor& x, const lemo_tensor& angles, const lemo_tensor& positions,
                      float direction) = 0;

  // out = silu(gate) * up; all [M, f].
  virtual void swiglu(const lemo_tensor& out, const lemo_tensor& gate, const lemo_tensor& up) = 0;

  // Replaces gate and up by their gradients.
  virtual void swiglu_backward(const lemo_tensor& gate, const lemo_tensor& up, const lemo_tensor& dout) = 0;

 protected:
  Backend(const lemo_exec& exec, lemo_dtype dtype) : exec_(exec), dtype_(dtype) {}

  // Aligned to 256 bytes, as workspaces have to be.
  virtual std::shared_ptr<void> allocate(size_t bytes) = 0;

  lemo_exec exec_;

 private:
  lemo_dtype dtype_;
  std::shared_ptr<void> workspace_;
};

// threads: of the CPU, 0 = all cores.
std::unique_ptr<Backend> make_cpu_backend(int threads);

// Throws Error if the program or liblemo was built without CUDA, or there is no GPU.
std::unique_ptr<Backend> make_cuda_backend();

// ---- workspaces of liblemo's operations; nullptr where an operation needs none
// ---------------------------------------

inline std::nullptr_t workspace_of(const lemo_gather_args*) { return nullptr; }
inline std::nullptr_t workspace_of(const lemo_scatter_add_args*) { return nullptr; }
inline std::nullptr_t workspace_of(const lemo_gather_norm_args*) { return nullptr; }
inline auto workspace_of(const lemo_gather_norm_backward_args*) { return &lemo_gather_norm_backward_workspace; }
inline auto workspace_of(const lemo_select_args*) { return &lemo_select_workspace; }
inline auto workspace_of(const lemo_scores_args*) { return &lemo_scores_workspace; }
inline auto workspace_of(const lemo_predict_args*) { return &lemo_predict_workspace; }
inline auto workspace_of(const lemo_attention_forward_args*) { return &lemo_attention_forward_workspace; }
inline auto workspace_of(const lemo_attention_backward_args*) { return &lemo_attention_backward_workspace; }
inline auto workspace_of(const lemo_linear_cross_entropy_args*) { return &lemo_linear_cross_entropy_workspace; }

template <class Args>
void Backend::run(const Args& args) {
  const auto workspace = workspace_of(static_cast<const Args*>(nullptr));
  if constexpr (!std::is_null_pointer_v<decltype(workspace)>) {
    uint64_t bytes = 0;
    lemo::check(workspace(&exec_, &args, &bytes));
    if (bytes > exec_.workspace_size) {
      workspace_.reset();  // first give back, then take: the two need not fit side by side
      workspace_ = allocate(bytes);
      exec_.workspace = workspace_.get();
      exec_.workspace_size = bytes;
    }
  }
  lemo::run(exec_, args);
}

}  // namespace trainer
