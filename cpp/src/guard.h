// The boundary of the C interface: no exception crosses it, and the message of a failure stays readable on its thread.
#pragma once

#include <cstring>
#include <exception>
#include <new>
#include <string>

#include "src/backend.h"

namespace lemo {

// Replaces this thread's last error. Allocates nothing.
void set_last_error(const char* operation, const char* message) noexcept;
void clear_last_error() noexcept;

template <class Function>
lemo_status guarded(const char* operation, Function&& function) noexcept {
  clear_last_error();
  try {
    function();
    return LEMO_OK;
  } catch (const Error& error) {
    set_last_error(operation, error.what());
    return error.status;
  } catch (const std::bad_alloc&) {
    set_last_error(operation, "out of host memory");
    return LEMO_BACKEND_ERROR;
  } catch (const std::length_error&) {  // more than any container can hold
    set_last_error(operation, "out of host memory");
    return LEMO_BACKEND_ERROR;
  } catch (const std::exception& error) {
    set_last_error(operation, error.what());
    return LEMO_INTERNAL_ERROR;
  } catch (...) {
    set_last_error(operation, "unknown exception");
    return LEMO_INTERNAL_ERROR;
  }
}

// The caller's struct as this build knows it. An older, shorter struct leaves the fields it lacks zero (absent); a
// newer, longer one is accepted while the fields this build does not know are zero.
template <class Struct>
Struct read_struct(const char* name, const Struct* given) {
  if (given == nullptr) throw Error(LEMO_INVALID_ARGUMENT, std::string(name) + ": expected a pointer, got NULL");
  uint64_t size = 0;
  std::memcpy(&size, given, sizeof(size));
  // Every argument struct is aligned to 8 bytes, in every version.
  if (size < sizeof(uint64_t) || size > (uint64_t{1} << 20) || size % alignof(uint64_t) != 0) {
    throw Error(LEMO_INVALID_ARGUMENT, std::string(name) + ".struct_size: expected sizeof the struct (" +
                                           std::to_string(sizeof(Struct)) + " in this build), got " +
                                           std::to_string(size));
  }
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  for (uint64_t i = sizeof(Struct); i < size; ++i) {
    if (bytes[i] != 0) {
      throw Error(LEMO_UNSUPPORTED, std::string(name) + ": a field at byte " + std::to_string(i) +
                                        " is set that lemo " + lemo_version() + " does not know; update lemo");
    }
  }
  Struct copy;
  std::memset(static_cast<void*>(&copy), 0, sizeof(copy));
  std::memcpy(static_cast<void*>(&copy), given, size < sizeof(copy) ? size : sizeof(copy));
  return copy;
}

}  // namespace lemo
