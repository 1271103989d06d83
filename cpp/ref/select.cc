#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "ref/ops.h"
#include "ref/view.h"

namespace lemo::ref {
namespace {

constexpr float kCertain = 0.999f;  // SAMPLE always draws blocks of at least this probability

// SAMPLE takes the blocks of lowest rank.
double pareto_rank(uint64_t seed, int64_t block, float probability) {
  if (probability >= kCertain) return -1.0;
  const double u = lemo_hash_uniform(seed, static_cast<uint64_t>(block));
  const double p = probability;
  return (u / (1.0 - u)) / (p / (1.0 - p));
}

bool draws(const lemo_select_args& a) { return a.mode == LEMO_SELECT_SAMPLE || a.mode == LEMO_SELECT_POISSON; }

void check_scores(const lemo_select_args& a, const float* scores, int64_t num_blocks) {
  for (int64_t n = 0; n < num_blocks; ++n) {
    if (!std::isfinite(scores[n])) {
      throw Error(LEMO_NUMERICAL, "scores: expected finite scores, got " + std::to_string(scores[n]) + " for block " +
                                      std::to_string(n));
    }
    if (draws(a) && !(scores[n] > 0.0f && scores[n] <= 1.0f)) {
      throw Error(LEMO_NUMERICAL, "scores: expected probabilities in (0, 1], got " + std::to_string(scores[n]) +
                                      " for block " + std::to_string(n));
    }
  }
}

// Marks the kept blocks of one document [first, last).
void choose(const lemo_select_args& a, const float* scores, int64_t first, int64_t last, std::vector<bool>& keep) {
  const int64_t n = last - first;
  const auto forced = [&](int64_t block) { return block - first < a.always_first || last - block <= a.always_last; };
  int64_t count = 0;
  for (int64_t block = first; block < last; ++block) {
    keep[static_cast<size_t>(block)] = forced(block);
    count += forced(block);
  }
  if (a.mode == LEMO_SELECT_THRESHOLD) {
    for (int64_t block = first; block < last; ++block) {
      if (scores[block] >= a.threshold) keep[static_cast<size_t>(block)] = true;
    }
    return;
  }
  if (a.mode == LEMO_SELECT_POISSON) {
    for (int64_t block = first; block < last; ++block) {
      const double u = lemo_hash_uniform(a.seed, static_cast<uint64_t>(block));
      if (u < static_cast<double>(scores[block])) keep[static_cast<size_t>(block)] = true;
    }
    return;
  }
  const auto wanted = static_cast<int64_t>(std::floor(static_cast<double>(a.keep) * static_cast<double>(n) + 0.5));
  const int64_t k = std::min(n, std::max({wanted, count, int64_t{1}}));
  std::vector<double> rank(static_cast<size_t>(n));
  std::vector<int64_t> order;
  for (int64_t block = first; block < last; ++block) {
    if (keep[static_cast<size_t>(block)]) continue;
    rank[static_cast<size_t>(block - first)] =
        a.mode == LEMO_SELECT_SAMPLE ? pareto_rank(a.seed, block, scores[block]) : -static_cast<double>(scores[block]);
    order.push_back(block);
  }
  // The sort is stable, so that ties go to the lower block.
  std::stable_sort(order.begin(), order.end(), [&](int64_t left, int64_t right) {
    return rank[static_cast<size_t>(left - first)] < rank[static_cast<size_t>(right - first)];
  });
  for (int64_t i = 0; i < k - count; ++i) keep[static_cast<size_t>(order[static_cast<size_t>(i)])] = true;
}

}  // namespace

void select(const lemo_exec&, const lemo_select_args& a) {
  const int64_t num_blocks = a.scores.shape[0];
  const int64_t num_documents = a.blocks.documents.shape[0] - 1;
  const float* scores = floats(a.scores);
  const int32_t* offsets = ints(a.blocks.offsets);
  const int32_t* documents = ints(a.blocks.documents);
  check_scores(a, scores, num_blocks);
  std::vector<bool> keep(static_cast<size_t>(num_blocks));
  for (int64_t d = 0; d < num_documents; ++d) choose(a, scores, documents[d], documents[d + 1], keep);
  if (a.mode == LEMO_SELECT_THRESHOLD && std::find(keep.begin(), keep.end(), true) == keep.end()) {
    throw Error(LEMO_NUMERICAL, "threshold: expected a threshold that keeps at least one block, got " +
                                    std::to_string(a.threshold) + " above every score (highest " +
                                    std::to_string(*std::max_element(scores, scores + num_blocks)) + ")");
  }

  int32_t slot = 0;
  int32_t packed = 0;
  int32_t longest = 0;
  for (int64_t d = 0; d < num_documents; ++d) {
    ints(a.cu_seqlens)[d] = packed;
    for (int32_t block = documents[d]; block < documents[d + 1]; ++block) {
      const bool kept = keep[static_cast<size_t>(block)];
      ints(a.slots)[block] = kept ? slot : -1;
      if (!kept) continue;
      const bool forced = block - documents[d] < a.always_first || documents[d + 1] - block <= a.always_last;
      const bool weighted = a.mode == LEMO_SELECT_POISSON && !forced;
      ints(a.kept)[slot] = block;
      ints(a.row_offsets)[slot] = packed;
      floats(a.weights)[slot] = weighted ? 1.0f / scores[block] : 1.0f;
      for (int32_t token = offsets[block]; token < offsets[block + 1]; ++token, ++packed) {
        ints(a.rows)[packed] = token;
        ints(a.row_slots)[packed] = slot;
      }
      ++slot;
    }
    longest = std::max(longest, packed - ints(a.cu_seqlens)[d]);
  }
  ints(a.cu_seqlens)[num_documents] = packed;
  std::fill(ints(a.kept) + slot, ints(a.kept) + num_blocks, -1);
  std::fill(ints(a.row_offsets) + slot, ints(a.row_offsets) + num_blocks + 1, packed);
  std::fill(floats(a.weights) + slot, floats(a.weights) + num_blocks, 0.0f);
  std::fill(ints(a.rows) + packed, ints(a.rows) + a.rows.shape[0], -1);
  std::fill(ints(a.row_slots) + packed, ints(a.row_slots) + a.row_slots.shape[0], -1);
  ints(a.info)[LEMO_INFO_KEPT_BLOCKS] = slot;
  ints(a.info)[LEMO_INFO_KEPT_ROWS] = packed;
  ints(a.info)[LEMO_INFO_LONGEST_DOCUMENT] = longest;
  ints(a.info)[LEMO_INFO_FAULT] = 0;
}

uint64_t select_workspace(const lemo_exec&, const lemo_select_args&) { return 0; }

}  // namespace lemo::ref
