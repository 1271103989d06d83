// Visitors of the fields of every argument struct, from the list in lemo/operations.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "lemo/lemo.h"
#include "lemo/operations.h"

namespace lemo {

enum class FieldRole { input, optional, companion, output, optional_output, inout, value, layout, reserved };

constexpr bool is_output(FieldRole role) {
  return role == FieldRole::output || role == FieldRole::optional_output || role == FieldRole::inout;
}

template <class Args>
struct Fields;

// Fields<lemo_X_args>::visit(args, visitor) calls visitor(role, name, field) for every field after struct_size, in
// order. The list is complete: the structs have no padding, so the sizes of their fields add up.
#define LEMO_VISIT(role, field) visitor(FieldRole::role, #field, args.field);
#define LEMO_BYTES(role, field) +sizeof(Struct::field)
#define LEMO_OFFSET(role, field) offsetof(Struct, field),
#define LEMO_DEFINE_FIELDS(op)                                                                           \
  template <>                                                                                            \
  struct Fields<lemo_##op##_args> {                                                                      \
    using Struct = lemo_##op##_args;                                                                     \
    template <class Args, class Visitor>                                                                 \
    static void visit(Args& args, Visitor&& visitor) {                                                   \
      LEMO_FIELDS_##op(LEMO_VISIT)                                                                       \
    }                                                                                                    \
    static constexpr bool ascend() {                                                                     \
      constexpr size_t offsets[] = {LEMO_FIELDS_##op(LEMO_OFFSET) sizeof(Struct)};                       \
      for (size_t i = 0; i + 1 < sizeof(offsets) / sizeof(offsets[0]); ++i) {                            \
        if (offsets[i] >= offsets[i + 1]) return false;                                                  \
      }                                                                                                  \
      return true;                                                                                       \
    }                                                                                                    \
    static constexpr size_t bytes() { return sizeof(Struct::struct_size) LEMO_FIELDS_##op(LEMO_BYTES); } \
  };                                                                                                     \
  static_assert(Fields<lemo_##op##_args>::ascend(), "LEMO_FIELDS_" #op ": expected the struct's order"); \
  static_assert(Fields<lemo_##op##_args>::bytes() == sizeof(lemo_##op##_args),                           \
                "LEMO_FIELDS_" #op ": expected every field of the struct, and a reserved field instead of padding");
LEMO_OPERATIONS(LEMO_DEFINE_FIELDS, LEMO_DEFINE_FIELDS)
#undef LEMO_DEFINE_FIELDS
#undef LEMO_OFFSET
#undef LEMO_BYTES
#undef LEMO_VISIT

// Calls visitor(role, name, tensor) for every tensor of the struct, in order. Args may be const.
template <class Args, class Visitor>
void for_each_tensor(Args& args, Visitor&& visitor) {
  Fields<std::remove_const_t<Args>>::visit(args, [&](FieldRole role, const char* name, auto& field) {
    using Field = std::remove_const_t<std::remove_reference_t<decltype(field)>>;
    if constexpr (std::is_same_v<Field, lemo_tensor>) {
      visitor(role, name, field);
    } else if constexpr (std::is_same_v<Field, lemo_blocks>) {
      visitor(FieldRole::input, "offsets", field.offsets);
      visitor(FieldRole::input, "documents", field.documents);
    }
  });
}

// Calls visitor(name, value) for every reserved field.
template <class Args, class Visitor>
void for_each_reserved(const Args& args, Visitor&& visitor) {
  Fields<Args>::visit(args, [&](FieldRole role, const char* name, const auto& field) {
    using Field = std::remove_const_t<std::remove_reference_t<decltype(field)>>;
    if constexpr (std::is_same_v<Field, lemo_blocks>) {
      visitor("blocks.reserved", field.reserved);
    } else if constexpr (std::is_same_v<Field, int32_t>) {
      if (role == FieldRole::reserved) visitor(name, field);
    }
  });
}

}  // namespace lemo
