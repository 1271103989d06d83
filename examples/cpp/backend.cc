#include "backend.h"

#include "error.h"
#include "half.h"

namespace trainer {

int64_t element_size(int32_t dtype) {
  switch (dtype) {
    case LEMO_F16:
    case LEMO_BF16:
      return 2;
    case LEMO_I64:
      return 8;
    case LEMO_U8:
      return 1;
    default:
      return 4;
  }
}

int64_t count(const lemo_tensor& tensor) {
  int64_t product = 1;
  for (int32_t i = 0; i < tensor.ndim; ++i) product *= tensor.shape[i];
  return product;
}

int64_t Tensor::count() const { return trainer::count(view_); }

lemo_tensor Tensor::as(std::initializer_list<int64_t> shape) const {
  return lemo::view(view_.data, static_cast<lemo_dtype>(view_.dtype), shape);
}

lemo_tensor Tensor::first(int64_t n) const {
  lemo_tensor part = view_;
  part.shape[0] = n;
  return part;
}

Tensor Backend::make(std::initializer_list<int64_t> shape, lemo_dtype dtype) {
  lemo_tensor view = lemo::view(nullptr, dtype, shape);
  // At least one byte, so that an empty tensor is still one.
  auto memory = allocate(static_cast<size_t>(count(view) * element_size(dtype)) + 1);
  view.data = memory.get();
  return Tensor(std::move(memory), view);
}

void Backend::upload_floats(const lemo_tensor& to, const float* from) {
  if (to.dtype == LEMO_F32) return upload(to, from);
  if (to.dtype != LEMO_BF16) fail("upload_floats: expected a float32 or bfloat16 tensor");
  std::vector<uint16_t> bits(static_cast<size_t>(count(to)));
  for (size_t i = 0; i < bits.size(); ++i) bits[i] = float_to_bf16(from[i]);
  upload(to, bits.data());
}

std::vector<float> Backend::download_floats(const lemo_tensor& from) {
  if (from.dtype != LEMO_F32) fail("download_floats: expected a float32 tensor");
  std::vector<float> values(static_cast<size_t>(count(from)));
  download(values.data(), from);
  return values;
}

#ifndef TRAINER_WITH_CUDA
std::unique_ptr<Backend> make_cuda_backend() {
  fail("--device cuda: this program was built without CUDA; configure it where CMake finds nvcc and cuBLAS");
}
#endif

}  // namespace trainer
