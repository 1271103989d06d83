// The values of index lists in host memory: a wrong index would read or write outside a tensor.
#include <limits>
#include <vector>

#include "src/tile_slots.h"
#include "src/validate.h"

namespace lemo {
namespace {

template <class... Parts>
[[noreturn]] void invalid(const Parts&... parts) {
  std::string message;
  auto append = [&](const auto& part) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>) {
      message += std::to_string(part);
    } else {
      message += part;
    }
  };
  (append(parts), ...);
  throw Error(LEMO_INVALID_ARGUMENT, message);
}

const int32_t* ints(const lemo_tensor& t) { return static_cast<const int32_t*>(t.data); }

}  // namespace

void check_blocks_values(const lemo_blocks& blocks, int64_t num_tokens) {
  const int32_t* offsets = ints(blocks.offsets);
  const int32_t* documents = ints(blocks.documents);
  const int64_t num_blocks = blocks.offsets.shape[0] - 1;
  const int64_t num_documents = blocks.documents.shape[0] - 1;
  if (offsets[0] != 0) invalid("offsets: expected to begin with 0, got ", offsets[0]);
  if (documents[0] != 0) invalid("documents: expected to begin with 0, got ", documents[0]);
  for (int64_t d = 0; d < num_documents; ++d) {
    if (documents[d + 1] == documents[d]) {
      invalid("documents: document ", d, " is empty: expected at least one block, got none");
    }
    if (documents[d + 1] < documents[d] || documents[d + 1] > num_blocks) {
      invalid("documents: expected ascending blocks up to ", num_blocks, ", got ", documents[d + 1], " after ",
              documents[d]);
    }
  }
  if (documents[num_documents] != num_blocks) {
    invalid("documents: expected to end with num_blocks = ", num_blocks, ", got ", documents[num_documents]);
  }
  int64_t document = 0;
  for (int64_t n = 0; n < num_blocks; ++n) {
    const int64_t tokens = int64_t{offsets[n + 1]} - offsets[n];
    if (tokens == 0) invalid("offsets: block ", n, " is empty: expected 1 to ", blocks.block_size, " tokens, got 0");
    if (tokens < 0) invalid("offsets: expected ascending tokens, got ", offsets[n + 1], " after ", offsets[n]);
    if (tokens > blocks.block_size) {
      invalid("offsets: block ", n, ": expected at most block_size = ", blocks.block_size, " tokens, got ", tokens);
    }
    const bool last = documents[document + 1] == n + 1;
    if (!last && tokens != blocks.block_size) {
      invalid("offsets: block ", n, ": expected block_size = ", blocks.block_size,
              " tokens (only the last block of a document may be shorter), got ", tokens);
    }
    if (last) ++document;
  }
  if (num_tokens >= 0 && offsets[num_blocks] != num_tokens) {
    invalid("offsets: expected to end with the number of tokens T = ", num_tokens, ", got ", offsets[num_blocks]);
  }
}

void check_rows_values(const lemo_tensor& rows, int64_t count, int64_t num_rows, bool padding, bool unique,
                       const char* name) {
  const int32_t* list = ints(rows);
  std::vector<bool> seen(unique ? static_cast<size_t>(num_rows) : 0);
  for (int64_t i = 0; i < count; ++i) {
    const int32_t row = list[i];
    if (row == -1 && padding) continue;
    if (row < 0 || row >= num_rows) {
      invalid(name, ": expected rows in [0, ", num_rows, ")", padding ? " or -1" : "", ", got ", row, " at position ",
              i);
    }
    if (!unique) continue;
    if (seen[static_cast<size_t>(row)]) invalid(name, ": expected no row twice, got ", row, " again at position ", i);
    seen[static_cast<size_t>(row)] = true;
  }
}

void check_slots_values(const char* name, const lemo_tensor& slots, int64_t count, int64_t num_slots,
                        const lemo_tensor& rows) {
  const int32_t* list = ints(slots);
  for (int64_t i = 0; i < count; ++i) {
    if (rows.ndim != 0 && ints(rows)[i] == -1) continue;
    if (list[i] < 0 || list[i] >= num_slots) {
      invalid(name, ": expected block slots in [0, ", num_slots, "), got ", list[i], " at position ", i);
    }
  }
}

int64_t check_cu_seqlens_values(const char* side, const lemo_tensor& cu_seqlens, int64_t capacity, int64_t max_seqlen) {
  const int32_t* list = ints(cu_seqlens);
  const int64_t documents = cu_seqlens.shape[0] - 1;
  if (list[0] != 0) invalid("cu_seqlens", side, ": expected to begin with 0, got ", list[0]);
  for (int64_t d = 0; d < documents; ++d) {
    if (list[d + 1] < list[d]) {
      invalid("cu_seqlens", side, ": expected ascending rows, got ", list[d + 1], " after ", list[d]);
    }
    if (int64_t{list[d + 1]} - list[d] > max_seqlen) {
      invalid("max_seqlen", side, ": expected at least the longest document, ", list[d + 1] - list[d], " rows, got ",
              max_seqlen);
    }
  }
  if (list[documents] > capacity) {
    invalid("cu_seqlens", side, ": expected to end with at most ", capacity, " rows, got ", list[documents]);
  }
  return list[documents];
}

void check_rows_ascend(const char* name, const lemo_tensor& rows, const lemo_tensor& cu_seqlens) {
  const int32_t *list = ints(rows), *begin = ints(cu_seqlens);
  for (int64_t d = 0; d + 1 < cu_seqlens.shape[0]; ++d) {
    for (int64_t i = begin[d] + 1; i < begin[d + 1]; ++i) {
      if (list[i] <= list[i - 1]) {
        invalid(name, ": expected ascending rows within a document, got ", list[i], " after ", list[i - 1],
                " at position ", i);
      }
    }
  }
}

void check_places_values(const char* name, const lemo_tensor& places, const lemo_tensor& cu_seqlens) {
  const int32_t* list = ints(places);
  const int64_t count = ints(cu_seqlens)[cu_seqlens.shape[0] - 1];
  for (int64_t i = 0; i < count; ++i) {
    if (list[i] < 0) invalid(name, ": expected places of at least 0, got ", list[i], " at position ", i);
  }
  check_rows_ascend(name, places, cu_seqlens);
}

void check_tile_lists_values(const lemo_tensor& offsets, const lemo_tensor& tiles, const lemo_tensor& cu_seqlens,
                             bool transposed) {
  const int32_t* begin = ints(offsets);
  const int32_t* list = ints(tiles);
  const int32_t* starts = ints(cu_seqlens);
  if (begin[0] != 0) invalid("tile_offsets: expected to begin with 0, got ", begin[0]);
  const int64_t slots = offsets.shape[0] - 1;
  for (int64_t s = 0; s < slots; ++s) {
    if (begin[s + 1] < begin[s] || begin[s + 1] > tiles.shape[0]) {
      invalid("tile_offsets: expected ascending values up to ", tiles.shape[0], ", got ", begin[s + 1], " after ",
              begin[s]);
    }
  }
  int64_t next = 0;  // slots before it have been checked
  for (int64_t d = 0; d + 1 < cu_seqlens.shape[0]; ++d) {
    const int64_t count = (int64_t{starts[d + 1]} - starts[d] + LEMO_TILE_ROWS - 1) / LEMO_TILE_ROWS;
    const int64_t first = starts[d] / LEMO_TILE_ROWS + d;
    for (; next < first + count; ++next) {
      const int64_t tile = next - first;
      int64_t before = transposed ? tile : -1;
      const int64_t end = tile < 0 ? 0 : transposed ? count : tile;
      for (int64_t i = begin[next]; i < begin[next + 1]; before = list[i], ++i) {
        if (list[i] > before && list[i] < end) continue;
        invalid("tiles: slot ", next, ": expected ascending tiles from ", before + 1, " to ", end - 1, ", got ",
                list[i]);
      }
    }
  }
}

void check_tile_slots_values(const lemo_tensor& cu_seqlens, int64_t slots) {
  const int64_t any = std::numeric_limits<int32_t>::max();
  check_cu_seqlens_values("", cu_seqlens, any, any);
  int64_t needed = 0;
  for_each_tile(cu_seqlens, [&](const TileSlot& tile) { needed = tile.slot + 1; });
  if (needed > slots) {
    invalid("chosen: expected S >= ", needed, ", slots for the tiles of cu_seqlens, got S = ", slots);
  }
}

void check_tile_width_values(const char* name, const lemo_tensor& cu_seqlens, int64_t first, int64_t last,
                             int64_t width, const char* letter) {
  for_each_tile(cu_seqlens, [&](const TileSlot& tile) {
    if (tile.slot < first || tile.slot >= last || tile.index < width) return;
    invalid(name, ": expected ", letter, " >= ", tile.index + 1, " tiles, as many as document ", tile.document,
            " has up to slot ", tile.slot, ", got ", letter, " = ", width);
  });
}

void check_chosen_values(const lemo_tensor& chosen, const lemo_tensor& cu_seqlens, int64_t entries) {
  std::vector<int64_t> own(static_cast<size_t>(chosen.shape[0]));  // slots without a tile see nothing
  for_each_tile(cu_seqlens, [&](const TileSlot& tile) { own[static_cast<size_t>(tile.slot)] = tile.index; });
  int64_t count = 0;
  for (int64_t slot = 0; slot < chosen.shape[0]; ++slot) {
    const int32_t* bits = ints(chosen) + slot * chosen.stride[0];
    const int64_t end = own[static_cast<size_t>(slot)];
    for_each_bit(bits, chosen.shape[1], [&](int64_t tile) {
      ++count;
      if (tile >= end) {
        invalid("chosen: slot ", slot, ": expected bits below ", end, ", the number of tiles before its own, got bit ",
                tile);
      }
    });
  }
  if (count > entries) {
    invalid("tiles: expected L >= ", count, ", the number of bits set in chosen, got L = ", entries);
  }
}

void check_targets_values(const lemo_tensor& targets, int64_t ignore_index, int64_t num_classes) {
  const auto* list = static_cast<const int64_t*>(targets.data);
  for (int64_t i = 0; i < targets.shape[0]; ++i) {
    if (list[i] == ignore_index || (list[i] >= 0 && list[i] < num_classes)) continue;
    invalid("targets: expected classes in [0, ", num_classes, ") or ignore_index = ", ignore_index, ", got ", list[i],
            " at position ", i);
  }
}

}  // namespace lemo
