// Exact block informativeness on the CPU: one task per key block, which walks the query blocks of its document.
#include <algorithm>
#include <vector>

#include "ref/ops.h"
#include "ref/parallel.h"
#include "ref/simd.h"
#include "ref/tiles.h"
#include "ref/view.h"

namespace lemo::ref {
namespace {

// std::max would drop a NaN, and selection must get to see it.
float max_or_nan(float a, float b) { return a >= b || a != a ? a : b; }

class Column {
 public:
  explicit Column(const lemo_scores_args& a)
      : a_(a), heads_(a.q.shape[1]), key_heads_(a.k.shape[1]), dim_(a.q.shape[2]), offsets_(ints(a.blocks.offsets)) {}

  // I(m, block) for m = block .. last - 1, and their sum.
  void run(int64_t block, int64_t last) const {
    std::vector<float> kt(static_cast<size_t>(key_heads_ * dim_ * kTile)), queries(static_cast<size_t>(kTile * dim_));
    std::vector<float> product(kTile * kTile), sum(kTile * kTile), top(static_cast<size_t>(last - block));
    for (int64_t key = offsets_[block]; key < offsets_[block + 1]; key += kTile) {
      const int64_t keys = std::min<int64_t>(kTile, offsets_[block + 1] - key);
      for (int64_t h = 0; h < key_heads_; ++h) {
        pack_transposed(kt.data() + h * dim_ * kTile, keys, dim_, [&](int64_t j) { return row(a_.k, key + j, h); });
      }
      for (int64_t m = block; m < last; ++m) {
        for (int64_t query = std::max<int64_t>(offsets_[m], key); query < offsets_[m + 1]; query += kTile) {
          const int64_t rows = std::min<int64_t>(kTile, offsets_[m + 1] - query);
          head_sum(query, rows, kt.data(), queries.data(), product.data(), sum.data());
          for (int64_t i = 0; i < rows; ++i) {
            const int64_t visible = std::min(keys, query + i - key + 1);
            top[m - block] = max_or_nan(top[m - block], simd().max(visible, sum.data() + i * kTile));
          }
        }
      }
    }
    float total = 0.0f;
    for (int64_t m = block; m < last; ++m) {
      const float score = top[m - block] / static_cast<float>(heads_);
      total += score;
      if (present(a_.map)) row(a_.map, m)[block] = score;
    }
    floats(a_.scores)[block] = a_.normalize ? total / static_cast<float>(last - block) : total;
  }

 private:
  // sum [rows, kTile] = sum over the heads of max(scale * q k, 0)
  void head_sum(int64_t query, int64_t rows, const float* kt, float* queries, float* product, float* sum) const {
    std::fill(sum, sum + rows * kTile, 0.0f);
    for (int64_t h = 0; h < heads_; ++h) {
      pack_rows(queries, dim_, rows, dim_, [&](int64_t i) { return row(a_.q, query + i, h); });
      const float* keys = kt + h / (heads_ / key_heads_) * dim_ * kTile;
      simd().matmul(rows, kTile, dim_, queries, dim_, 1, keys, kTile, product, kTile, false);
      simd().add_positive(rows * kTile, sum, product, a_.scale);
    }
  }

  const lemo_scores_args& a_;
  int64_t heads_, key_heads_, dim_;
  const int32_t* offsets_;
};

}  // namespace

void scores(const lemo_exec& exec, const lemo_scores_args& a) {
  const int64_t num_blocks = a.blocks.offsets.shape[0] - 1, documents = a.blocks.documents.shape[0] - 1;
  if (present(a.map)) {
    for (int64_t m = 0; m < num_blocks; ++m) std::fill(row(a.map, m), row(a.map, m) + num_blocks, 0.0f);
  }
  std::vector<int64_t> last(static_cast<size_t>(num_blocks));
  for (int64_t d = 0; d < documents; ++d) {
    const int32_t* first = ints(a.blocks.documents) + d;
    std::fill(last.begin() + first[0], last.begin() + first[1], first[1]);
  }
  const Column column(a);
  parallel_for(exec, num_blocks, [&](int64_t block) { column.run(block, last[static_cast<size_t>(block)]); });
}

uint64_t scores_workspace(const lemo_exec&, const lemo_scores_args&) { return 0; }

}  // namespace lemo::ref
