// One exception for everything the user can mend: a message that names the thing, what was expected and what was found.
#pragma once

#include <sstream>
#include <stdexcept>

namespace trainer {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// fail("config.json: model_type is ", type) throws Error with the parts written one after the other.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}

}  // namespace trainer
