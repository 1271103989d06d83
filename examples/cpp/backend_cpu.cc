// The CPU: float32 throughout.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>

#include "backend.h"
#include "error.h"
#include "gemm.h"
#include "parallel.h"

namespace trainer {
namespace {

constexpr size_t kAlignment = 256;
constexpr int64_t kRowsAtOnce = 64;  // a piece of work of the elementwise operations

float* floats(const lemo_tensor& tensor) { return static_cast<float*>(tensor.data); }
const int32_t* integers(const lemo_tensor& tensor) { return static_cast<const int32_t*>(tensor.data); }

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(int threads) : Backend(lemo::cpu(threads), LEMO_F32), threads_(threads) {}

  void upload(const lemo_tensor& to, const void* from) override { std::memcpy(to.data, from, bytes(to)); }
  void download(void* to, const lemo_tensor& from) override { std::memcpy(to, from.data, bytes(from)); }

  void zero(const lemo_tensor& tensor) override { std::memset(tensor.data, 0, bytes(tensor)); }

  void matmul(const lemo_tensor& out, float alpha, const lemo_tensor& a, Op op_a, const lemo_tensor& b, Op op_b,
              float beta) override {
    const int64_t k = op_a == Op::kPlain ? a.shape[1] : a.shape[0];
    gemm(threads_, out.shape[0], out.shape[1], k, alpha, matrix(a, op_a), matrix(b, op_b), beta, floats(out),
         out.stride[0]);
  }

  void embed(const lemo_tensor& out, const lemo_tensor& table, const lemo_tensor& tokens) override {
    const auto d = static_cast<size_t>(table.shape[1]);
    for (int64_t i = 0; i < out.shape[0]; ++i) {
      std::memcpy(floats(out) + i * out.stride[0], floats(table) + integers(tokens)[i] * table.stride[0],
                  d * sizeof(float));
    }
  }

  void rotate(const lemo_tensor& x, const lemo_tensor& angles, const lemo_tensor& positions, float direction) override {
    const int64_t heads = x.shape[1];
    const int64_t half = x.shape[2] / 2;
    for_rows(x.shape[0], [&](int64_t i) {
      const float* cosine = floats(angles) + integers(positions)[i] * angles.stride[0];
      const float* sine = cosine + half;
      for (int64_t h = 0; h < heads; ++h) {
        float* first = floats(x) + i * x.stride[0] + h * x.stride[1];
        float* second = first + half;
        for (int64_t c = 0; c < half; ++c) {
          const float u = first[c];
          const float v = second[c];
          first[c] = u * cosine[c] - direction * v * sine[c];
          second[c] = v * cosine[c] + direction * u * sine[c];
        }
      }
    });
  }

  void swiglu(const lemo_tensor& out, const lemo_tensor& gate, const lemo_tensor& up) override {
    const int64_t width = out.shape[1];
    for_rows(out.shape[0], [&](int64_t i) {
      const float* g = floats(gate) + i * width;
      const float* u = floats(up) + i * width;
      for (int64_t c = 0; c < width; ++c) floats(out)[i * width + c] = g[c] / (1.0f + std::exp(-g[c])) * u[c];
    });
  }

  void swiglu_backward(const lemo_tensor& gate, const lemo_tensor& up, const lemo_tensor& dout) override {
    const int64_t width = dout.shape[1];
    for_rows(dout.shape[0], [&](int64_t i) {
      float* g = floats(gate) + i * width;
      float* u = floats(up) + i * width;
      const float* d = floats(dout) + i * width;
      for (int64_t c = 0; c < width; ++c) {
        const float sigmoid = 1.0f / (1.0f + std::exp(-g[c]));
        const float silu = g[c] * sigmoid;
        const float slope = sigmoid + silu * (1.0f - sigmoid);
        g[c] = d[c] * u[c] * slope;
        u[c] = d[c] * silu;
      }
    });
  }

 protected:
  std::shared_ptr<void> allocate(size_t bytes) override {
    void* memory = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    if (memory == nullptr) fail("out of memory: ", bytes, " bytes could not be allocated");
    return std::shared_ptr<void>(memory, &std::free);
  }

 private:
  static size_t bytes(const lemo_tensor& tensor) {
    return static_cast<size_t>(count(tensor) * element_size(tensor.dtype));
  }

  static Matrix matrix(const lemo_tensor& x, Op op) {
    return op == Op::kPlain ? Matrix{floats(x), x.stride[0], 1} : Matrix{floats(x), 1, x.stride[0]};
  }

  template <class Body>
  void for_rows(int64_t rows, const Body& body) const {
    parallel_for(threads_, (rows + kRowsAtOnce - 1) / kRowsAtOnce, [&](int64_t piece) {
      const int64_t end = std::min(rows, (piece + 1) * kRowsAtOnce);
      for (int64_t i = piece * kRowsAtOnce; i < end; ++i) body(i);
    });
  }

  int threads_;
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(int threads) {
  if (threads == 0) threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  return std::make_unique<CpuBackend>(threads);
}

}  // namespace trainer
