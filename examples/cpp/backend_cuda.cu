// CUDA: bfloat16 weights and activations, sums in float32, matrix products by cuBLAS. Everything is queued on one
// stream; only `download` waits for it.
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "backend.h"
#include "error.h"

namespace trainer {
namespace {

constexpr int kThreads = 256;
constexpr int kDevice = 0;  // CUDA_VISIBLE_DEVICES chooses another

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) fail("CUDA: ", what, ": ", cudaGetErrorString(status));
}

void check(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS) fail("cuBLAS: ", what, ": ", cublasGetStatusString(status));
}

// ---- kernels: one thread per element (or pair), in a loop over the grid, so that any size fits any launch
// --------------

__device__ int64_t first_index() { return blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; }
__device__ int64_t index_step() { return gridDim.x * static_cast<int64_t>(blockDim.x); }

// out [n, d] = table[tokens]
__global__ void embed_kernel(__nv_bfloat16* out, const __nv_bfloat16* table, const int32_t* tokens, int64_t n,
                             int64_t d) {
  for (int64_t i = first_index(); i < n * d; i += index_step()) out[i] = table[tokens[i / d] * d + i % d];
}

// x [M, H, D] in place; a thread per pair (c, c + D/2).
__global__ void rotate_kernel(__nv_bfloat16* x, const float* angles, const int32_t* positions, int64_t rows,
                              int64_t heads, int64_t half, float direction) {
  for (int64_t i = first_index(); i < rows * heads * half; i += index_step()) {
    const int64_t c = i % half;
    const int64_t head = i / half;  // of all rows
    const float* row = angles + positions[head / heads] * 2 * half;
    const float cosine = row[c];
    const float sine = direction * row[half + c];
    __nv_bfloat16* first = x + head * 2 * half + c;
    __nv_bfloat16* second = first + half;
    const float u = __bfloat162float(*first);
    const float v = __bfloat162float(*second);
    *first = __float2bfloat16(u * cosine - v * sine);
    *second = __float2bfloat16(v * cosine + u * sine);
  }
}

__global__ void swiglu_kernel(__nv_bfloat16* out, const __nv_bfloat16* gate, const __nv_bfloat16* up, int64_t n) {
  for (int64_t i = first_index(); i < n; i += index_step()) {
    const float g = __bfloat162float(gate[i]);
    out[i] = __float2bfloat16(g / (1.0f + __expf(-g)) * __bfloat162float(up[i]));
  }
}

__global__ void swiglu_backward_kernel(__nv_bfloat16* gate, __nv_bfloat16* up, const __nv_bfloat16* dout, int64_t n) {
  for (int64_t i = first_index(); i < n; i += index_step()) {
    const float g = __bfloat162float(gate[i]);
    const float d = __bfloat162float(dout[i]);
    const float sigmoid = 1.0f / (1.0f + __expf(-g));
    const float silu = g * sigmoid;
    gate[i] = __float2bfloat16(d * __bfloat162float(up[i]) * (sigmoid + silu * (1.0f - sigmoid)));
    up[i] = __float2bfloat16(d * silu);
  }
}

// ---- the backend
// -----------------------------------------------------------------------------------------------------

__nv_bfloat16* halves(const lemo_tensor& tensor) { return static_cast<__nv_bfloat16*>(tensor.data); }
const int32_t* integers(const lemo_tensor& tensor) { return static_cast<const int32_t*>(tensor.data); }

size_t bytes(const lemo_tensor& tensor) { return static_cast<size_t>(count(tensor) * element_size(tensor.dtype)); }

struct StreamDeleter {
  void operator()(cudaStream_t stream) const { cudaStreamDestroy(stream); }
};
struct HandleDeleter {
  void operator()(cublasHandle_t handle) const { cublasDestroy(handle); }
};
using Stream = std::shared_ptr<CUstream_st>;  // shared: memory is returned on the stream by the last owner
using Handle = std::unique_ptr<cublasContext, HandleDeleter>;

Stream make_stream() {
  check(cudaSetDevice(kDevice), "no device");
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream");
  return Stream(stream, StreamDeleter());
}

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(Stream stream) : Backend(lemo::cuda(kDevice, stream.get()), LEMO_BF16), stream_(stream) {
    cublasHandle_t handle = nullptr;
    check(cublasCreate(&handle), "creating a handle");
    cublas_.reset(handle);
    check(cublasSetStream(handle, stream_.get()), "setting the stream");
    // Freed memory stays in the pool: a step takes and gives back the same sizes as the step before.
    cudaMemPool_t pool = nullptr;
    uint64_t everything = UINT64_MAX;
    check(cudaDeviceGetDefaultMemPool(&pool, kDevice), "memory pool");
    check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &everything), "memory pool");
  }

  void upload(const lemo_tensor& to, const void* from) override {
    // Pageable host memory is copied aside before the call returns, so `from` may be changed afterwards.
    check(cudaMemcpyAsync(to.data, from, bytes(to), cudaMemcpyHostToDevice, stream_.get()), "copying to the device");
  }

  void download(void* to, const lemo_tensor& from) override {
    check(cudaMemcpyAsync(to, from.data, bytes(from), cudaMemcpyDeviceToHost, stream_.get()), "copying to the host");
    check(cudaStreamSynchronize(stream_.get()), "waiting for the device");
  }

  void zero(const lemo_tensor& tensor) override {
    check(cudaMemsetAsync(tensor.data, 0, bytes(tensor), stream_.get()), "clearing memory");
  }

  // cuBLAS reads matrices column by column, in which a row-major matrix is its own transpose: it is asked for
  // out^T [n, m] = op(b)^T op(a)^T.
  void matmul(const lemo_tensor& out, float alpha, const lemo_tensor& a, Op op_a, const lemo_tensor& b, Op op_b,
              float beta) override {
    const auto size = [](int64_t n) { return static_cast<int>(n); };
    const auto operation = [](Op op) { return op == Op::kPlain ? CUBLAS_OP_N : CUBLAS_OP_T; };
    const int64_t k = op_a == Op::kPlain ? a.shape[1] : a.shape[0];
    const cudaDataType_t out_type = out.dtype == LEMO_F32 ? CUDA_R_32F : CUDA_R_16BF;
    check(cublasGemmEx(cublas_.get(), operation(op_b), operation(op_a), size(out.shape[1]), size(out.shape[0]), size(k),
                       &alpha, b.data, CUDA_R_16BF, size(b.stride[0]), a.data, CUDA_R_16BF, size(a.stride[0]), &beta,
                       out.data, out_type, size(out.stride[0]), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
          "matrix product");
  }

  void embed(const lemo_tensor& out, const lemo_tensor& table, const lemo_tensor& tokens) override {
    launch(count(out), embed_kernel, halves(out), halves(table), integers(tokens), out.shape[0], out.shape[1]);
  }

  void rotate(const lemo_tensor& x, const lemo_tensor& angles, const lemo_tensor& positions, float direction) override {
    launch(count(x) / 2, rotate_kernel, halves(x), static_cast<const float*>(angles.data), integers(positions),
           x.shape[0], x.shape[1], x.shape[2] / 2, direction);
  }

  void swiglu(const lemo_tensor& out, const lemo_tensor& gate, const lemo_tensor& up) override {
    launch(count(out), swiglu_kernel, halves(out), halves(gate), halves(up), count(out));
  }

  void swiglu_backward(const lemo_tensor& gate, const lemo_tensor& up, const lemo_tensor& dout) override {
    launch(count(dout), swiglu_backward_kernel, halves(gate), halves(up), halves(dout), count(dout));
  }

 protected:
  std::shared_ptr<void> allocate(size_t size) override {
    void* memory = nullptr;
    check(cudaMallocAsync(&memory, size, stream_.get()), "allocating memory");
    return std::shared_ptr<void>(memory, [stream = stream_](void* at) { cudaFreeAsync(at, stream.get()); });
  }

 private:
  // Calls kernel(arguments...) with a thread for each of n elements, up to a grid that fills any device.
  template <class... Parameters, class... Arguments>
  void launch(int64_t n, void (*kernel)(Parameters...), Arguments... arguments) {
    if (n == 0) return;
    const auto blocks = static_cast<unsigned>(std::min<int64_t>((n + kThreads - 1) / kThreads, 65535));
    kernel<<<blocks, kThreads, 0, stream_.get()>>>(arguments...);
    check(cudaGetLastError(), "launching a kernel");
  }

  Stream stream_;
  Handle cublas_;
};

}  // namespace

std::unique_ptr<Backend> make_cuda_backend() {
  if (lemo_has_backend(LEMO_CUDA) == 0) {
    fail("--device cuda: this liblemo was built without CUDA, or no GPU that it supports is present");
  }
  return std::make_unique<CudaBackend>(make_stream());
}

}  // namespace trainer
