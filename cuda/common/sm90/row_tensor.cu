#include <cuda_runtime.h>

#include <string>

#include "common/check.h"
#include "common/sm90/row_tensor.h"

namespace lemo::cuda::sm90 {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function through the runtime, so that the library does not link libcuda.
Encode encoder() {
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          "cudaGetDriverEntryPointByVersion");
    if (found != cudaDriverEntryPointSuccess || function == nullptr) {
      throw Error(LEMO_BACKEND_ERROR, "the driver has no cuTensorMapEncodeTiled; it must be 12.0 or newer");
    }
    return reinterpret_cast<Encode>(function);
  }();
  return encode;
}

CUtensorMap encode_box(const TensorView& view, int64_t storage_rows, int heads, int head_dim, int box_columns,
                       int box_rows, int32_t dtype) {
  CUtensorMap map{};
  const cuuint64_t shape[3] = {static_cast<cuuint64_t>(head_dim), static_cast<cuuint64_t>(heads),
                               static_cast<cuuint64_t>(storage_rows)};
  // The stride of a single head or row carries no meaning, but must be a valid one here.
  const int64_t head_stride = heads > 1 ? view.head_stride : (head_dim + 7) / 8 * 8;
  const int64_t row_stride = storage_rows > 1 ? view.row_stride : heads * head_stride;
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(head_stride) * 2, static_cast<cuuint64_t>(row_stride) * 2};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(box_columns), 1, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult result =
      encoder()(&map, dtype == LEMO_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
                view.data, shape, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                box_columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw Error(LEMO_BACKEND_ERROR, "cuTensorMapEncodeTiled: error " + std::to_string(result) + " for [" +
                                        std::to_string(storage_rows) + ", " + std::to_string(heads) + ", " +
                                        std::to_string(head_dim) + "]");
  }
  return map;
}

}  // namespace

RowTensor make_row_tensor(const TensorView& view, int64_t storage_rows, int heads, int head_dim, int box_columns,
                          int32_t dtype) {
  return {encode_box(view, storage_rows, heads, head_dim, box_columns, kRunRows, dtype),
          encode_box(view, storage_rows, heads, head_dim, box_columns, 1, dtype), view, head_dim};
}

}  // namespace lemo::cuda::sm90
