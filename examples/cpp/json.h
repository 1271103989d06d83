// Just enough JSON to read config.json, tokenizer.json and the headers of safetensors files.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace trainer {

// A JSON value. Objects keep the order of the file; numbers are doubles, exact for integers below 2^53.
class Json {
 public:
  using Array = std::vector<Json>;
  using Object = std::vector<std::pair<std::string, Json>>;

  Json() = default;
  template <class T>
  explicit Json(T value) : value_(std::move(value)) {}

  // Parses a whole document; `where` names it in error messages.
  static Json parse(std::string_view text, const std::string& where);
  static Json read(const std::string& path);

  bool is_null() const { return std::holds_alternative<std::nullptr_t>(value_); }
  bool is_string() const { return std::holds_alternative<std::string>(value_); }

  // Typed access. `what` names the value in the error that another type raises.
  bool boolean(const std::string& what) const;
  double number(const std::string& what) const;
  int64_t integer(const std::string& what) const;
  const std::string& string(const std::string& what) const;
  const Array& array(const std::string& what) const;
  const Object& object(const std::string& what) const;

  // The member of an object, or nullptr where it is absent or null: config.json writes "not set" either way.
  const Json* find(std::string_view name) const;

 private:
  std::variant<std::nullptr_t, bool, double, std::string, Array, Object> value_ = nullptr;
};

// The whole of a file.
std::string read_file(const std::string& path);

// `text` in quotation marks, escaped.
std::string json_quoted(std::string_view text);

}  // namespace trainer
