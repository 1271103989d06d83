// Tokens to train on: a file of raw uint16 tokens, or plain text.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace trainer {

// Little-endian uint16 tokens without a header, the format that `lemo finetune` reads from *.bin files. Throws Error
// for tokens outside the vocabulary: the file was made with another tokenizer.
std::vector<int32_t> read_tokens(const std::string& path, int64_t vocabulary);

// UTF-8 text as tokens of the model's tokenizer.json, which must be byte-level BPE (GPT-2, Llama 3). The merges are
// the tokenizer's, but text is cut into words at white space only, without its regular expressions: tokens are nearly,
// not always exactly, those of the tokenizer itself. To train in earnest, tokenise with it and use a token file.
std::vector<int32_t> read_text(const std::string& path, const std::string& model_folder, int64_t vocabulary);

}  // namespace trainer
