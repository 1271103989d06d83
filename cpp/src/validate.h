// The rules for arguments, the same for every backend: struct fields, devices, dtypes, shapes, strides, alignment,
// ranges, and the values of index lists if they are in host memory. All throw lemo::Error.
#pragma once

#include "src/backend.h"

namespace lemo {

enum class Purpose {
  kWorkspace,  // shapes only; data pointers may be NULL
  kRun
};

void validate_exec(const lemo_exec& exec);

#define LEMO_DECLARE_VALIDATE(op) void validate(const lemo_exec& exec, const lemo_##op##_args& a, Purpose purpose);
LEMO_OPERATIONS(LEMO_DECLARE_VALIDATE, LEMO_DECLARE_VALIDATE)
#undef LEMO_DECLARE_VALIDATE

// Values of index lists in host memory (validate_values.cc).
void check_blocks_values(const lemo_blocks& blocks, int64_t num_tokens);  // num_tokens < 0: any
void check_rows_values(const lemo_tensor& rows, int64_t count, int64_t num_rows, bool padding, bool unique,
                       const char* name = "rows");
void check_slots_values(const char* name, const lemo_tensor& slots, int64_t count, int64_t num_slots,
                        const lemo_tensor& rows);
void check_rows_ascend(const char* name, const lemo_tensor& rows, const lemo_tensor& cu_seqlens);  // in every document
// Every place is at least 0, and they ascend in every document.
void check_places_values(const char* name, const lemo_tensor& places, const lemo_tensor& cu_seqlens);
// Returns M. `side`: of the arguments' names, "" or "_k".
int64_t check_cu_seqlens_values(const char* side, const lemo_tensor& cu_seqlens, int64_t capacity, int64_t max_seqlen);
void check_tile_lists_values(const lemo_tensor& offsets, const lemo_tensor& tiles, const lemo_tensor& cu_seqlens,
                             bool transposed);
// Every tile of the documents has a slot.
void check_tile_slots_values(const lemo_tensor& cu_seqlens, int64_t slots);
// Query tiles with slots in [first, last) see at most `width` tiles; `letter`: the dimension of `name` that says so.
void check_tile_width_values(const char* name, const lemo_tensor& cu_seqlens, int64_t first, int64_t last,
                             int64_t width, const char* letter);
// Bits stand for tiles below the own one, and there are at most `entries` of them.
void check_chosen_values(const lemo_tensor& chosen, const lemo_tensor& cu_seqlens, int64_t entries);
void check_targets_values(const lemo_tensor& targets, int64_t ignore_index, int64_t num_classes);

}  // namespace lemo
