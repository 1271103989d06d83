// The choice of key tiles for every query tile, and its lists.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "ref/ops.h"
#include "ref/parallel.h"
#include "ref/view.h"
#include "src/tile_slots.h"

namespace lemo::ref {
namespace {

constexpr double kUnits = 1099511627776.0;  // 2^40 for a score of 1

struct Candidate {
  float score;
  int64_t tile;
};

// A mass as the sum counts it. NaN counts as 0.
uint64_t units(float mass) {
  if (!(mass > 0.0f)) return 0;
  return static_cast<uint64_t>(std::min(static_cast<double>(mass), 1.0) * kUnits);  // a power of 2: exact until cut
}

// The most tiles that query tile `own` sees, itself included, unless more are always there.
int64_t budget(const lemo_select_tiles_args& a, int64_t own) {
  const int64_t keys = (a.keys - 1) / LEMO_TILE_ROWS + 1;
  const double share = std::floor(static_cast<double>(a.density) * static_cast<double>(own + 1) + 0.5);
  return std::min(keys, static_cast<int64_t>(share));
}

// Sets the bits of one query tile's row, which is zero; returns the sum in units. `candidates` has room for `own`
// tiles.
uint64_t choose(const lemo_select_tiles_args& a, int64_t own, const float* scores, const float* masses,
                Candidate* candidates, int32_t* bits) {
  const auto set = [&](int64_t n) { reinterpret_cast<uint32_t*>(bits)[n / 32] |= uint32_t{1} << (n % 32); };
  int64_t count = 1, rest = 0;
  uint64_t sum = units(masses[own]);
  for (int64_t n = 0; n < own; ++n) {
    if (n < a.first || own - n <= a.local) {
      set(n);
      ++count;
      sum += units(masses[n]);
    } else {
      const float score = std::isnan(scores[n]) ? -std::numeric_limits<float>::infinity() : scores[n];
      candidates[rest++] = {score, n};
    }
  }
  const int64_t wanted = std::clamp<int64_t>(budget(a, own) - count, 0, rest);
  std::partial_sort(candidates, candidates + wanted, candidates + rest, [](const Candidate& x, const Candidate& y) {
    return x.score != y.score ? x.score > y.score : x.tile > y.tile;
  });
  // A multiple of a unit is at least `mass` if and only if it is at least the next multiple of one from there.
  const uint64_t enough = a.mass >= 1.0f ? std::numeric_limits<uint64_t>::max()
                                         : static_cast<uint64_t>(std::ceil(static_cast<double>(a.mass) * kUnits));
  for (int64_t i = 0; i < wanted && sum < enough; ++i) {
    set(candidates[i].tile);
    sum += units(masses[candidates[i].tile]);
  }
  return sum;
}

int32_t* int_row(const lemo_tensor& t, int64_t i) { return ints(t) + i * t.stride[0]; }

}  // namespace

void select_tiles(const lemo_exec& exec, const lemo_select_tiles_args& a) {
  const int64_t count = a.scores.shape[0];
  std::vector<int64_t> own(static_cast<size_t>(count), -1);  // the query tile of every slot, -1: none
  int64_t longest = 0;
  for_each_tile(a.cu_seqlens, [&](const TileSlot& tile) {
    if (tile.slot < a.first_slot || tile.slot >= a.first_slot + count) return;
    own[static_cast<size_t>(tile.slot - a.first_slot)] = tile.index;
    longest = std::max(longest, tile.index);
  });
  const int64_t workers = worker_count(exec, count);
  std::vector<Candidate> candidates(static_cast<size_t>((Size(workers) * longest).count("scores")));
  parallel_for(exec, count, [&](int64_t i, int worker) {
    int32_t* bits = int_row(a.chosen, a.first_slot + i);
    std::fill_n(bits, a.chosen.shape[1], 0);
    const int64_t tile = own[static_cast<size_t>(i)];
    const float* masses = row(present(a.masses) ? a.masses : a.scores, i);
    const uint64_t sum =
        tile < 0 ? 0 : choose(a, tile, row(a.scores, i), masses, candidates.data() + worker * longest, bits);
    if (present(a.covered)) floats(a.covered)[i] = static_cast<float>(static_cast<double>(sum) / kUnits);
  });
}

// Everything is made in separate memory first: an output may share memory with an input.
void list_tiles(const lemo_exec&, const lemo_list_tiles_args& a) {
  const int64_t slots = a.chosen.shape[0], words = a.chosen.shape[1];
  std::vector<int32_t> ends(static_cast<size_t>(slots + 1)), transposed_ends(ends);
  for_each_tile(a.cu_seqlens, [&](const TileSlot& tile) {
    for_each_bit(int_row(a.chosen, tile.slot), words, [&](int64_t n) {
      ++ends[static_cast<size_t>(tile.slot + 1)];
      ++transposed_ends[static_cast<size_t>(tile.slot - tile.index + n + 1)];
    });
  });
  std::partial_sum(ends.begin(), ends.end(), ends.begin());
  std::partial_sum(transposed_ends.begin(), transposed_ends.end(), transposed_ends.begin());
  std::vector<int32_t> tiles, transposed(static_cast<size_t>(ends.back())), next(transposed_ends);
  tiles.reserve(transposed.size());
  for_each_tile(a.cu_seqlens, [&](const TileSlot& tile) {
    for_each_bit(int_row(a.chosen, tile.slot), words, [&](int64_t n) {
      tiles.push_back(static_cast<int32_t>(n));
      int32_t& place = next[static_cast<size_t>(tile.slot - tile.index + n)];
      transposed[static_cast<size_t>(place++)] = static_cast<int32_t>(tile.index);
    });
  });
  const auto write = [](const std::vector<int32_t>& values, const lemo_tensor& out) {
    std::fill(std::copy(values.begin(), values.end(), ints(out)), ints(out) + out.shape[0], 0);
  };
  write(ends, a.tile_offsets);
  write(tiles, a.tiles);
  write(transposed_ends, a.transposed_offsets);
  write(transposed, a.transposed_tiles);
}

}  // namespace lemo::ref
