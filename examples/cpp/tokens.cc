#include "tokens.h"

#include <array>
#include <map>
#include <unordered_map>

#include "error.h"
#include "json.h"

namespace trainer {
namespace {

bool is_space(char c) { return c == ' ' || c == '\n' || c == '\t' || c == '\r'; }

// Byte-level BPE writes every byte as a printable character: itself where it is one, else the next free one from
// U+0100.
std::array<std::string, 256> byte_characters() {
  std::array<std::string, 256> characters;
  uint32_t free = 0x100;
  for (uint32_t byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
    const uint32_t code = printable ? byte : free++;
    std::string& out = characters[byte];
    if (code < 0x80) {
      out = {static_cast<char>(code)};
    } else {
      out = {static_cast<char>(0xC0 | (code >> 6)), static_cast<char>(0x80 | (code & 0x3F))};
    }
  }
  return characters;
}

class Tokenizer {
 public:
  explicit Tokenizer(const std::string& path) : path_(path) {
    const Json document = Json::read(path);
    const Json* model = document.find("model");
    const Json* type = model == nullptr ? nullptr : model->find("type");
    if (type == nullptr || type->string(path) != "BPE") refuse();
    const Json* vocab = model->find("vocab");
    const Json* merges = model->find("merges");
    if (vocab == nullptr || merges == nullptr) refuse();
    std::unordered_map<std::string, int32_t> ids;
    for (const auto& [text, id] : vocab->object(path)) ids[text] = static_cast<int32_t>(id.integer(path));
    const auto characters = byte_characters();
    for (size_t byte = 0; byte < 256; ++byte) {
      const auto found = ids.find(characters[byte]);
      if (found == ids.end()) refuse();
      bytes_[byte] = found->second;
    }
    for (const Json& merge : merges->array(path)) add_merge(merge, ids);
  }

  std::vector<int32_t> encode(const std::string& text) {
    std::vector<int32_t> tokens;
    for (size_t begin = 0; begin < text.size();) {
      size_t end = begin + 1;  // a word ends where white space begins
      while (end < text.size() && !(is_space(text[end]) && !is_space(text[end - 1]))) ++end;
      const std::string word = text.substr(begin, end - begin);
      auto known = words_.find(word);
      if (known == words_.end()) known = words_.emplace(word, merge(word)).first;
      tokens.insert(tokens.end(), known->second.begin(), known->second.end());
      begin = end;
    }
    return tokens;
  }

 private:
  struct Merge {
    size_t rank;
    int32_t token;
  };

  [[noreturn]] void refuse() const {
    fail(path_, ": not a byte-level BPE tokenizer, the only kind that --text reads; tokenise the text (README.md) and ",
         "use --tokens");
  }

  // Older files write "left right", newer ones ["left", "right"].
  void add_merge(const Json& merge, const std::unordered_map<std::string, int32_t>& ids) {
    std::string left;
    std::string right;
    if (merge.is_string()) {
      const std::string& both = merge.string(path_);
      const size_t space = both.find(' ');
      if (space == std::string::npos) refuse();
      left = both.substr(0, space);
      right = both.substr(space + 1);
    } else {
      const Json::Array& both = merge.array(path_);
      if (both.size() != 2) refuse();
      left = both[0].string(path_);
      right = both[1].string(path_);
    }
    const auto a = ids.find(left);
    const auto b = ids.find(right);
    const auto c = ids.find(left + right);
    if (a == ids.end() || b == ids.end() || c == ids.end()) refuse();
    merges_.emplace(std::pair(a->second, b->second), Merge{merges_.size(), c->second});
  }

  // Merges the pair of the lowest rank until none is left.
  std::vector<int32_t> merge(const std::string& word) const {
    std::vector<int32_t> tokens;
    for (const char c : word) tokens.push_back(bytes_[static_cast<unsigned char>(c)]);
    while (tokens.size() > 1) {
      const Merge* best = nullptr;
      size_t at = 0;
      for (size_t i = 0; i + 1 < tokens.size(); ++i) {
        const auto found = merges_.find({tokens[i], tokens[i + 1]});
        if (found != merges_.end() && (best == nullptr || found->second.rank < best->rank)) {
          best = &found->second;
          at = i;
        }
      }
      if (best == nullptr) break;
      tokens[at] = best->token;
      tokens.erase(tokens.begin() + static_cast<std::ptrdiff_t>(at) + 1);
    }
    return tokens;
  }

  std::string path_;
  std::array<int32_t, 256> bytes_ = {};
  std::map<std::pair<int32_t, int32_t>, Merge> merges_;
  std::unordered_map<std::string, std::vector<int32_t>> words_;  // text repeats its words
};

}  // namespace

std::vector<int32_t> read_tokens(const std::string& path, int64_t vocabulary) {
  const std::string raw = read_file(path);
  if (raw.size() % 2 != 0) {
    fail("--tokens: ", path, ": ", raw.size(), " bytes is not a whole number of uint16 tokens; truncated?");
  }
  std::vector<int32_t> tokens(raw.size() / 2);
  for (size_t i = 0; i < tokens.size(); ++i) {
    tokens[i] = static_cast<unsigned char>(raw[2 * i]) | static_cast<unsigned char>(raw[2 * i + 1]) << 8;
    if (tokens[i] >= vocabulary) {
      fail("--tokens: ", path, ": token ", tokens[i], " at position ", i, " lies outside the model's vocabulary of ",
           vocabulary, "; the file was made with another tokenizer");
    }
  }
  return tokens;
}

std::vector<int32_t> read_text(const std::string& path, const std::string& model_folder, int64_t vocabulary) {
  Tokenizer tokenizer(model_folder + "/tokenizer.json");
  std::vector<int32_t> tokens = tokenizer.encode(read_file(path));
  for (const int32_t token : tokens) {
    if (token < 0 || token >= vocabulary) {
      fail(model_folder, "/tokenizer.json: token ", token, " lies outside the model's vocabulary of ", vocabulary);
    }
  }
  return tokens;
}

}  // namespace trainer
