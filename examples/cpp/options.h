// The command line.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "selection.h"

namespace trainer {

struct CommandLine {
  std::string model;
  std::string tokens;  // one of tokens and text is given
  std::string text;
  std::string out;
  int64_t steps = 20;
  int64_t dense_steps = -1;  // -1: an eighth of the steps
  int64_t context = 512;
  int64_t evaluation_windows = 2;
  Selector::Options selection;
  double learning_rate = 1e-3;
  std::string adapter;  // folder to start from
  int64_t rank = 8;
  double alpha = 0;  // 0: twice the rank
  std::vector<std::string> targets = {"q_proj", "k_proj", "v_proj", "o_proj"};
  uint64_t seed = 0;
  bool cuda = false;
  int threads = 0;
  std::string dump_gradients;
};

// Throws Error for arguments that are unknown, malformed, missing or contradict each other. Empty after --help, which
// is printed.
std::optional<CommandLine> parse_command_line(int count, char** arguments);

}  // namespace trainer
