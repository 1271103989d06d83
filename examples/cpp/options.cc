#include "options.h"

#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <map>
#include <set>

#include "error.h"

namespace trainer {
namespace {

constexpr const char* kHelp = R"(lemo_train: LoRA fine-tuning with token elimination, in C++ on liblemo, without Python.

  lemo_train --model FOLDER (--tokens FILE | --text FILE) [options]

In most steps every layer works on part of the tokens only ("skip"); the last steps are dense, because the adapter
will be served by the dense model. What comes out is a PEFT adapter like any other.

Input
  --model FOLDER       a Llama-style model: config.json and model.safetensors (or its shards), F32, F16 or BF16
  --tokens FILE        raw little-endian uint16 tokens, for instance numpy's array.astype("<u2").tofile(FILE)
  --text FILE          UTF-8 text, tokenised with the model's tokenizer.json where that is byte-level BPE
  --adapter FOLDER     continue from this PEFT adapter (sets rank, alpha and targets; AdamW's averages begin anew)

Training
  --steps N            training steps of one window each; 0 only evaluates (default 20)
  --context N          tokens in a window (default 512)
  --lr X               AdamW's learning rate, constant (default 0.001)
  --rank N             of the LoRA matrices (default 8)
  --alpha X            the update is scaled by alpha / rank (default: twice the rank)
  --targets A,B,...    projections that get LoRA, of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj
                       (default: q_proj,k_proj,v_proj,o_proj)
  --seed N             of the initial matrices and of the blocks drawn (default 0)
  --eval-windows N     windows at the end of the text that are held out and evaluated, 0 = none (default 2)

Token elimination
  --keep X             fraction of the blocks that a layer keeps, in (0, 1] (default 0.5)
  --block N            tokens in a block (default 64)
  --policy NAME        random: one draw a step for all layers (default); exact: in every layer the blocks with the
                       highest attention scores; predictors: those with the highest predicted scores
  --calibration FOLDER predictors written by `lemo calibrate`, for --policy predictors
  --dense-steps N      how many of the steps, the last ones, keep everything (default: an eighth of them)

Machine
  --device cpu|cuda    float32 on the CPU, bfloat16 on CUDA (default cpu)
  --threads N          CPU threads, 0 = all cores (default 0)

Output
  --out FOLDER         the adapter: adapter_model.safetensors and adapter_config.json. Must not exist yet; it is written
                       completely or not at all. Without --out nothing is saved
  --dump-gradients F   the first step's loss, gradients and kept rows as a safetensors file, to compare with others

Example
  lemo_train --model demo/model --text README.md --steps 40 --context 512 --out adapter
)";

// Reads a number that takes up the whole text and lies in [low, high].
template <class T>
T number(const std::string& name, const std::string& text, T low, T high, const char* expected) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !(value >= low && value <= high)) {
    fail(name, ": expected ", expected, ", got '", text, "'");
  }
  return value;
}

std::vector<std::string> names(const std::string& text) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == ',') {
      parts.emplace_back();
    } else {
      parts.back().push_back(c);
    }
  }
  return parts;
}

Policy policy(const std::string& name, const std::string& text) {
  if (text == "random") return Policy::kRandom;
  if (text == "exact") return Policy::kExact;
  if (text == "predictors") return Policy::kPredictors;
  fail(name, ": expected random, exact or predictors, got '", text, "'");
}

bool is_cuda(const std::string& name, const std::string& text) {
  if (text == "cpu" || text == "cuda") return text == "cuda";
  fail(name, ": expected cpu or cuda, got '", text, "'");
}

using Setter = std::function<void(const std::string& name, const std::string& text)>;

Setter into(std::string& value) {
  return [&value](const std::string& name, const std::string& text) {
    if (text.empty()) fail(name, ": expected a path, got nothing");
    value = text;
  };
}

template <class T>
Setter into(T& value, T low, T high, const char* expected) {
  return [=, &value](const std::string& name, const std::string& text) {
    value = number<T>(name, text, low, high, expected);
  };
}

std::map<std::string, Setter> setters(CommandLine& o) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();  // rows are numbered by int32
  constexpr double kTiny = std::numeric_limits<double>::min();
  constexpr double kHuge = 1e6;
  Selector::Options& s = o.selection;
  return {
      {"--model", into(o.model)},
      {"--tokens", into(o.tokens)},
      {"--text", into(o.text)},
      {"--adapter", into(o.adapter)},
      {"--out", into(o.out)},
      {"--dump-gradients", into(o.dump_gradients)},
      {"--calibration", into(s.calibration)},
      {"--steps", into<int64_t>(o.steps, 0, kMost, "a whole number of at least 0")},
      {"--dense-steps", into<int64_t>(o.dense_steps, 0, kMost, "a whole number of at least 0")},
      {"--context", into<int64_t>(o.context, 2, kMost, "a whole number of at least 2")},
      {"--eval-windows", into<int64_t>(o.evaluation_windows, 0, kMost, "a whole number of at least 0")},
      {"--block", into<int64_t>(s.block, 1, kMost, "a whole number of at least 1")},
      {"--keep", into<float>(s.keep, std::numeric_limits<float>::min(), 1.0f, "a number above 0 and at most 1")},
      {"--lr", into<double>(o.learning_rate, 0.0, kHuge, "a number of at least 0")},
      {"--rank", into<int64_t>(o.rank, 1, 4096, "a whole number from 1 to 4096")},
      {"--alpha", into<double>(o.alpha, kTiny, kHuge, "a positive number")},
      {"--seed", into<uint64_t>(o.seed, 0, std::numeric_limits<uint64_t>::max(), "a whole number of at least 0")},
      {"--threads", into<int>(o.threads, 0, 4096, "a whole number of at least 0")},
      {"--targets", [&o](const std::string&, const std::string& text) { o.targets = names(text); }},
      {"--policy", [&s](const std::string& name, const std::string& text) { s.policy = policy(name, text); }},
      {"--device", [&o](const std::string& name, const std::string& text) { o.cuda = is_cuda(name, text); }},
  };
}

void check(const CommandLine& o, const std::set<std::string>& given) {
  if (o.model.empty()) fail("--model is missing; see --help");
  if (o.tokens.empty() == o.text.empty()) fail("expected one of --tokens and --text; see --help");
  if (o.dense_steps > o.steps) fail("--dense-steps: expected at most --steps ", o.steps, ", got ", o.dense_steps);
  const bool predicts = o.selection.policy == Policy::kPredictors;
  if (predicts && o.selection.calibration.empty()) fail("--policy predictors needs --calibration FOLDER");
  if (!predicts && !o.selection.calibration.empty()) fail("--calibration is used by --policy predictors only");
  for (const char* name : {"--rank", "--alpha", "--targets"}) {
    if (!o.adapter.empty() && given.count(name) != 0) fail(name, ": --adapter brings its own; give one of the two");
  }
  if (o.steps == 0 && !o.dump_gradients.empty()) fail("--dump-gradients needs at least one of --steps");
}

}  // namespace

std::optional<CommandLine> parse_command_line(int count, char** arguments) {
  CommandLine options;
  const auto known = setters(options);
  std::set<std::string> given;
  for (int i = 1; i < count; ++i) {
    const std::string name = arguments[i];
    if (name == "--help" || name == "-h") {
      std::fputs(kHelp, stdout);
      return std::nullopt;
    }
    const auto setter = known.find(name);
    if (setter == known.end()) fail("unknown argument '", name, "'; see --help");
    if (++i == count) fail(name, ": a value is missing; see --help");
    if (!given.insert(name).second) fail(name, ": given twice");
    setter->second(name, arguments[i]);
  }
  check(options, given);
  if (options.alpha == 0) options.alpha = 2.0 * static_cast<double>(options.rank);
  // Rounded up: a run of few steps has a dense one, too.
  if (options.dense_steps < 0) options.dense_steps = (options.steps + 7) / 8;
  options.selection.seed = options.seed;
  return options;
}

}  // namespace trainer
