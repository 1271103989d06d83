#include "json.h"

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "error.h"

namespace trainer {
namespace {

constexpr int kMaxDepth = 100;  // a hostile file must not exhaust the stack

class Parser {
 public:
  Parser(std::string_view text, const std::string& where) : text_(text), where_(where) {}

  Json document() {
    Json value = any(0);
    skip_space();
    if (at_ != text_.size()) broken("text after the end");
    return value;
  }

 private:
  [[noreturn]] void broken(const std::string& why) const { fail(where_, ": not JSON at byte ", at_, ": ", why); }

  void skip_space() {
    while (at_ < text_.size() && std::strchr(" \t\r\n", text_[at_]) != nullptr && text_[at_] != '\0') ++at_;
  }

  char peek() {
    skip_space();
    if (at_ == text_.size()) broken("the text ends early");
    return text_[at_];
  }

  bool take(char c) {
    if (peek() != c) return false;
    ++at_;
    return true;
  }

  void expect(char c) {
    if (!take(c)) broken(std::string("expected '") + c + "'");
  }

  Json any(int depth) {
    if (depth > kMaxDepth) broken("nested too deeply");
    switch (peek()) {
      case '{':
        return object(depth);
      case '[':
        return array(depth);
      case '"':
        return Json(string());
      case 't':
        return word("true", Json(true));
      case 'f':
        return word("false", Json(false));
      case 'n':
        return word("null", Json());
      default:
        return number();
    }
  }

  Json word(std::string_view expected, Json value) {
    if (text_.substr(at_, expected.size()) != expected) broken("unknown word");
    at_ += expected.size();
    return value;
  }

  Json number() {
    const size_t end = text_.find_first_not_of("+-0123456789.eE", at_);
    const std::string digits(text_.substr(at_, end == std::string_view::npos ? end : end - at_));
    char* stop = nullptr;
    const double value = std::strtod(digits.c_str(), &stop);
    if (digits.empty() || *stop != '\0') broken("expected a value");
    at_ += digits.size();
    return Json(value);
  }

  Json array(int depth) {
    Json::Array items;
    expect('[');
    if (take(']')) return Json(std::move(items));
    do {
      items.push_back(any(depth + 1));
    } while (take(','));
    expect(']');
    return Json(std::move(items));
  }

  Json object(int depth) {
    Json::Object members;
    expect('{');
    if (take('}')) return Json(std::move(members));
    do {
      if (peek() != '"') broken("expected a name in quotation marks");
      std::string name = string();
      expect(':');
      members.emplace_back(std::move(name), any(depth + 1));
    } while (take(','));
    expect('}');
    return Json(std::move(members));
  }

  std::string string() {
    std::string out;
    for (++at_; at_ < text_.size() && text_[at_] != '"'; ++at_) {
      if (text_[at_] == '\\') {
        escape(out);
      } else {
        out.push_back(text_[at_]);
      }
    }
    if (at_ == text_.size()) broken("a string without an end");
    ++at_;
    return out;
  }

  // Leaves at_ on the last character of the escape.
  void escape(std::string& out) {
    static constexpr char kNames[] = "\"\\/bfnrt";
    static constexpr char kValues[] = "\"\\/\b\f\n\r\t";
    if (++at_ == text_.size()) broken("a string without an end");
    if (text_[at_] == 'u') {
      uint32_t code = hex4();
      if (code >= 0xD800 && code < 0xDC00 && text_.substr(at_ + 1, 2) == "\\u") {  // a surrogate pair
        at_ += 2;
        code = 0x10000 + ((code - 0xD800) << 10) + (hex4() - 0xDC00);
      }
      append_utf8(code, out);
    } else if (const char* name = std::strchr(kNames, text_[at_]); name != nullptr && *name != '\0') {
      out.push_back(kValues[name - kNames]);
    } else {
      broken("unknown escape");
    }
  }

  uint32_t hex4() {
    uint32_t code = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = ++at_ < text_.size() ? text_[at_] : '\0';
      const int digit = c >= '0' && c <= '9' ? c - '0' : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : -1;
      if (digit < 0) broken("expected four hexadecimal digits");
      code = code * 16 + static_cast<uint32_t>(digit);
    }
    return code;
  }

  static void append_utf8(uint32_t code, std::string& out) {
    const auto tail = [&](int shift) { out.push_back(static_cast<char>(0x80 | ((code >> shift) & 0x3F))); };
    if (code < 0x80) {
      out.push_back(static_cast<char>(code));
    } else if (code < 0x800) {
      out.push_back(static_cast<char>(0xC0 | (code >> 6)));
      tail(0);
    } else if (code < 0x10000) {
      out.push_back(static_cast<char>(0xE0 | (code >> 12)));
      tail(6), tail(0);
    } else {
      out.push_back(static_cast<char>(0xF0 | (code >> 18)));
      tail(12), tail(6), tail(0);
    }
  }

  std::string_view text_;
  const std::string& where_;
  size_t at_ = 0;
};

template <class T, class Value>
const T& get(const Value& value, const std::string& what, const char* kind) {
  if (const T* found = std::get_if<T>(&value)) return *found;
  fail(what, ": expected ", kind);
}

}  // namespace

Json Json::parse(std::string_view text, const std::string& where) { return Parser(text, where).document(); }

Json Json::read(const std::string& path) { return parse(read_file(path), path); }

bool Json::boolean(const std::string& what) const { return get<bool>(value_, what, "true or false"); }

double Json::number(const std::string& what) const { return get<double>(value_, what, "a number"); }

int64_t Json::integer(const std::string& what) const {
  const double value = number(what);
  if (value != std::floor(value) || std::abs(value) > 0x1p53) fail(what, ": expected a whole number, got ", value);
  return static_cast<int64_t>(value);
}

const std::string& Json::string(const std::string& what) const { return get<std::string>(value_, what, "a string"); }

const Json::Array& Json::array(const std::string& what) const { return get<Array>(value_, what, "an array"); }

const Json::Object& Json::object(const std::string& what) const { return get<Object>(value_, what, "an object"); }

const Json* Json::find(std::string_view name) const {
  if (const auto* members = std::get_if<Object>(&value_)) {
    for (const auto& [key, value] : *members) {
      if (key == name) return value.is_null() ? nullptr : &value;
    }
  }
  return nullptr;
}

std::string read_file(const std::string& path) {
  if (std::filesystem::is_directory(path)) fail(path, ": expected a file, found a folder");
  std::ifstream file(path, std::ios::binary);
  std::string text;
  if (file) text.assign(std::istreambuf_iterator<char>(file), {});
  if (!file || file.bad()) fail(path, ": cannot be read (", std::strerror(errno), ")");
  return text;
}

std::string json_quoted(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out.push_back('\\'), out.push_back(c);
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char code[7];
      std::snprintf(code, sizeof code, "\\u%04x", c);
      out += code;
    } else {
      out.push_back(c);
    }
  }
  return out + '"';
}

}  // namespace trainer
