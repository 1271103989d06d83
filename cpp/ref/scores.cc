// Exact informativeness of key blocks. A task owns one key block and walks the query blocks that see it, so every
// column sum is computed by one thread in a fixed order, and no block map is needed.
#include <limits>
#include <vector>

#include "ref/attention_tiles.h"
#include "ref/ops.h"

namespace lemo::ref {
namespace {

struct Task {
  int64_t block;
  int64_t last;  // one past the document's last block
};

}  // namespace

void scores(const lemo_exec& exec, const lemo_scores_args& a) {
  const int64_t d = a.q.shape[2];
  const int64_t query_heads = a.q.shape[1];
  const int64_t key_heads = a.k.shape[1];
  const int32_t* offsets = ints(a.blocks.offsets);
  const int32_t* documents = ints(a.blocks.documents);
  const int64_t num_blocks = a.blocks.offsets.shape[0] - 1;
  int64_t size = 0;  // of the largest block: block_size is only a bound
  for (int64_t n = 0; n < num_blocks; ++n) size = std::max<int64_t>(size, offsets[n + 1] - offsets[n]);
  const int64_t width = round_up(size, kLane);
  const Scratch scratch(exec, num_blocks, "k", Size(key_heads) * d * width + (Size(d) + 2 * width) * size);
  std::vector<Task> tasks;
  for (int64_t doc = 0; doc + 1 < a.blocks.documents.shape[0]; ++doc) {
    for (int64_t n = documents[doc]; n < documents[doc + 1]; ++n) tasks.push_back({n, documents[doc + 1]});
  }
  if (present(a.map)) {
    for (int64_t m = 0; m < num_blocks; ++m) std::fill_n(row(a.map, m), num_blocks, 0.0f);
  }

  parallel_for(exec, num_blocks, [&](int64_t index, int worker) {
    const Simd& f = simd();
    const auto [n, last] = tasks[static_cast<size_t>(index)];
    const int64_t keys = offsets[n + 1] - offsets[n];
    float* keys_transposed = scratch.of(worker);  // [Hk, D, width]
    float* queries = keys_transposed + key_heads * d * width;
    float* products = queries + size * d;
    float* mean = products + size * width;
    std::fill_n(keys_transposed, key_heads * d * width, 0.0f);
    for (int64_t head = 0; head < key_heads; ++head) {
      for (int64_t j = 0; j < keys; ++j) {
        const float* k = row(a.k, offsets[n] + j, head);
        for (int64_t c = 0; c < d; ++c) keys_transposed[(head * d + c) * width + j] = k[c];
      }
    }
    double total = 0;
    int64_t terms = 0;
    for (int64_t m = n; m < last; ++m, ++terms) {
      const int64_t count = offsets[m + 1] - offsets[m];
      // The first key that the first row sees, counted from this block's; one more is hidden from each further row.
      const int64_t first_key = a.window > 0 ? offsets[m] - a.window + 1 - offsets[n] : -size;
      if (first_key >= keys) break;
      poll();
      std::fill_n(mean, count * width, 0.0f);
      for (int64_t head = 0; head < query_heads; ++head) {
        collect_rows(a.q, nullptr, head, offsets[m], count, 1.0f, d, queries);
        f.matmul(count, width, d, queries, d, 1, keys_transposed + head / (query_heads / key_heads) * d * width, width,
                 products, width, false);
        if (a.softcap > 0) {
          f.multiply(count * width, products, a.scale);
          f.softcap(count * width, products, a.softcap, nullptr);
        }
        f.add_positive(count * width, mean, products, a.softcap > 0 ? 1.0f : a.scale);
      }
      float highest = 0.0f;  // S is at least 0 everywhere
      for (int64_t i = 0; i < count; ++i) {
        const int64_t end = m == n ? std::min(keys, i + 1) : keys;
        const int64_t begin = std::clamp<int64_t>(first_key + i, 0, end);
        const float found = f.max(end - begin, mean + i * width + begin);
        if (found > highest || found != found) highest = found;
        if (found != found) break;
      }
      const float value = highest / static_cast<float>(query_heads);
      if (present(a.map)) row(a.map, m)[n] = value;
      total += value;
    }
    if (a.normalize != 0) total /= static_cast<double>(terms);
    floats(a.scores)[n] = static_cast<float>(total);
  });
}

uint64_t scores_workspace(const lemo_exec&, const lemo_scores_args&) { return 0; }

}  // namespace lemo::ref
