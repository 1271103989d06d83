// Linear cross-entropy: per segment of tokens the logits, their softmax and gradient in place, and the products that
// consume the gradient, before the next segment overwrites it. Everything that reads a segment of `hidden` runs
// before its rows of dhidden are written, so the two may be the same memory.
#include "common/check.h"
#include "common/gemm.h"
#include "kernels.h"
#include "loss/softmax.h"
#include "rows/rows.cuh"

namespace lemo::cuda {
namespace {

constexpr int64_t kLogitsBytes = int64_t{128} << 20;  // of a segment, unless the caller chooses its rows
constexpr int64_t kRowTile = 128;                     // segments are whole tiles of the matrix kernels

struct Workspace {
  LossScales* scales;
  float* losses;     // [N]
  uint16_t* logits;  // [segment, columns]
  uint16_t* lora;    // [segment, r]: h A^T
  uint16_t* dlora;   // [segment, r]: its gradient, scaled like that of the logits
  void* gemm;
  uint64_t bytes;
};

class Loss {
 public:
  Loss(const lemo_exec& exec, const lemo_linear_cross_entropy_args& a)
      : exec_(exec),
        a_(a),
        n_(a.hidden.shape[0]),
        d_(a.hidden.shape[1]),
        classes_(a.weight.shape[0]),
        columns_(round_up(classes_, kVector)),
        r_(present(a.lora_a) ? a.lora_a.shape[0] : 0) {
    if (r_ % kVector != 0) {
      throw Error(LEMO_UNSUPPORTED, "lora_a: expected r to be a multiple of 8 on CUDA, got " + std::to_string(r_) +
                                        "; pad lora_a with zero rows and lora_b with zero columns");
    }
    segment_ = a.segment_rows;
    if (segment_ == 0) {
      segment_ = kLogitsBytes / 2 / columns_ / kRowTile * kRowTile;
      if (segment_ < 2 * kRowTile) segment_ = 2 * kRowTile;
    }
    if (segment_ > n_) segment_ = n_;
    lora_gradient_ = r_ > 0 && (present(a.dhidden) || present(a.dlora_a));
    gradient_ =
        present(a.dhidden) || present(a.dweight) || present(a.dbias) || present(a.dlora_a) || present(a.dlora_b);
  }

  Workspace layout(void* base) {
    Arena arena(base);
    w_ = {};
    w_.scales = arena.take<LossScales>(1);
    w_.losses = arena.take<float>(n_);
    w_.logits = arena.take<uint16_t>(Size(segment_) * columns_);
    w_.lora = arena.take<uint16_t>(Size(segment_) * r_);
    w_.dlora = arena.take<uint16_t>(lora_gradient_ ? Size(segment_) * r_ : Size(0));
    gemm_bytes_ = 0;
    measuring_ = true;
    if (n_ > 0) {
      products(0, segment_);
      if (n_ % segment_ != 0) products(0, n_ % segment_);
    }
    measuring_ = false;
    w_.gemm = arena.take<char>(static_cast<int64_t>(gemm_bytes_));
    w_.bytes = arena.size();
    return w_;
  }

  void run() {
    const cudaStream_t stream = stream_of(exec_);
    const bool mean = a_.reduction == LEMO_REDUCE_MEAN;
    count_valid(stream, data<int64_t>(a_.targets), n_, a_.ignore_index, mean, a_.lora_scale, data<int64_t>(a_.valid),
                w_.scales);
    if (n_ == 0) clear_gradients();
    for (int64_t first = 0; first < n_; first += segment_) {
      products(first, n_ - first < segment_ ? n_ - first : segment_);
    }
    reduce_loss(stream, w_.losses, n_, mean, data<int64_t>(a_.valid), data<float>(a_.loss));
  }

 private:
  struct Matrix {
    const void* data;
    int64_t stride;
  };
  static Matrix matrix(const lemo_tensor& t, int64_t first_row = 0) {
    const int64_t stride = row_stride(t), size = t.dtype == LEMO_F32 ? 4 : 2;
    return {static_cast<const char*>(t.data) + first_row * stride * size, stride};
  }

  struct Factors {
    float alpha, beta;
    const float* alpha_device = nullptr;  // replaces alpha
  };

  // Runs one product, or with measuring_ only notes its workspace.
  void multiply(GemmKind kind, int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, Matrix d, Factors factors) {
    Gemm g = {};
    g.kind = kind, g.dtype = a_.hidden.dtype;
    g.m = m, g.n = n, g.k = k;
    g.a = a.data, g.lda = a.stride;
    g.b = b.data, g.ldb = b.stride;
    g.d = const_cast<void*>(d.data), g.ldd = d.stride;
    g.alpha = factors.alpha, g.beta = factors.beta, g.alpha_device = factors.alpha_device;
    if (measuring_) {
      const uint64_t bytes = gemm_workspace(exec_.device_index, g);
      gemm_bytes_ = bytes > gemm_bytes_ ? bytes : gemm_bytes_;
    } else {
      gemm(exec_.device_index, stream_of(exec_), g, w_.gemm);
    }
  }

  void products(int64_t first, int64_t rows) {
    const Matrix hidden = matrix(a_.hidden, first), weight = matrix(a_.weight);
    const Matrix logits = {w_.logits, columns_}, lora = {w_.lora, r_}, dlora = {w_.dlora, r_};
    const float later = first > 0 ? 1.0f : 0.0f;  // beta of gradients that add up over segments
    const float* gradient = measuring_ ? nullptr : &w_.scales->gradient;
    const float* lora_gradient = measuring_ ? nullptr : &w_.scales->lora_gradient;

    multiply(GemmKind::kNT, rows, classes_, d_, hidden, weight, logits, {1.0f, 0.0f});
    if (r_ > 0) {
      multiply(GemmKind::kNT, rows, r_, d_, hidden, matrix(a_.lora_a), lora, {1.0f, 0.0f});
      multiply(GemmKind::kNT, rows, classes_, r_, lora, matrix(a_.lora_b), logits, {a_.lora_scale, 1.0f});
    }
    if (!measuring_) {
      SoftmaxArgs softmax = {};
      softmax.dtype = a_.hidden.dtype;
      softmax.logits = w_.logits;
      softmax.rows = rows, softmax.classes = classes_, softmax.stride = columns_;
      softmax.bias = data<void>(a_.bias);
      softmax.targets = data<int64_t>(a_.targets) + first, softmax.ignore_index = a_.ignore_index;
      softmax.softcap = a_.softcap;
      softmax.gradient = gradient_;
      softmax.losses = w_.losses + first;
      softmax_loss(stream_of(exec_), softmax);
      if (present(a_.dbias)) sum_columns(stream_of(exec_), softmax, w_.scales, first > 0, data<float>(a_.dbias));
    }
    if (present(a_.dweight)) {
      multiply(GemmKind::kTN, classes_, d_, rows, logits, hidden, matrix(a_.dweight), {1.0f, later, gradient});
    }
    if (present(a_.dlora_b)) {
      multiply(GemmKind::kTN, classes_, r_, rows, logits, lora, matrix(a_.dlora_b), {1.0f, later, lora_gradient});
    }
    if (lora_gradient_) {
      multiply(GemmKind::kNN, rows, r_, classes_, logits, matrix(a_.lora_b), dlora, {a_.lora_scale, 0.0f});
    }
    if (present(a_.dlora_a)) {
      multiply(GemmKind::kTN, r_, d_, rows, dlora, hidden, matrix(a_.dlora_a), {1.0f, later, gradient});
    }
    if (present(a_.dhidden)) {
      const Matrix dhidden = matrix(a_.dhidden, first);
      multiply(GemmKind::kNN, rows, d_, classes_, logits, weight, dhidden, {1.0f, 0.0f, gradient});
      if (r_ > 0) multiply(GemmKind::kNN, rows, d_, r_, dlora, matrix(a_.lora_a), dhidden, {1.0f, 1.0f, gradient});
    }
  }

  void clear_gradients() {
    for (const lemo_tensor* t : {&a_.dweight, &a_.dbias, &a_.dlora_a, &a_.dlora_b}) {
      if (!present(*t)) continue;
      const int64_t rows = t->ndim == 2 ? t->shape[0] : 1, width = t->shape[t->ndim - 1];
      if (rows == 0 || width == 0) continue;
      const int64_t stride = t->ndim == 2 && rows > 1 ? t->stride[0] : width;
      check(cudaMemset2DAsync(t->data, static_cast<size_t>(stride) * 4, 0, static_cast<size_t>(width) * 4,
                              static_cast<size_t>(rows), stream_of(exec_)),
            "linear_cross_entropy: zero gradients");
    }
  }

  const lemo_exec& exec_;
  const lemo_linear_cross_entropy_args& a_;
  const int64_t n_, d_, classes_, columns_, r_;
  int64_t segment_ = 0;
  bool lora_gradient_ = false, gradient_ = false, measuring_ = false;
  uint64_t gemm_bytes_ = 0;
  Workspace w_ = {};
};

}  // namespace

uint64_t linear_cross_entropy_workspace(const lemo_exec& exec, const lemo_linear_cross_entropy_args& a) {
  return Loss(exec, a).layout(nullptr).bytes;
}

void linear_cross_entropy(const lemo_exec& exec, const lemo_linear_cross_entropy_args& a) {
  const DeviceGuard guard(exec.device_index);
  Loss loss(exec, a);
  loss.layout(exec.workspace);
  loss.run();
}

}  // namespace lemo::cuda
