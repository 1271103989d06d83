// Fine-tunes LoRA matrices on a text with token elimination. See README.md for a walk through the files.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <exception>
#include <filesystem>

#include "adapter.h"
#include "error.h"
#include "options.h"
#include "tokens.h"
#include "training.h"

namespace trainer {
namespace {

// The text, cut into windows of `context` tokens; the last ones are held out. What does not fill a window is not used.
struct Windows {
  std::vector<int32_t> tokens;
  int64_t context;
  int64_t training;
  int64_t held_out;

  const int32_t* training_window(int64_t step) const { return tokens.data() + step % training * context; }
  const int32_t* held_out_window(int64_t i) const { return tokens.data() + (training + i) * context; }
};

Windows read_windows(const CommandLine& options, const Config& config) {
  Windows windows{};
  windows.tokens = options.tokens.empty() ? read_text(options.text, options.model, config.vocabulary)
                                          : read_tokens(options.tokens, config.vocabulary);
  windows.context = options.context;
  windows.held_out = options.evaluation_windows;
  const int64_t all = static_cast<int64_t>(windows.tokens.size()) / options.context;
  windows.training = all - windows.held_out;
  if (windows.training < (options.steps > 0 ? 1 : 0)) {
    fail(options.tokens.empty() ? options.text : options.tokens, ": ", windows.tokens.size(), " tokens make ", all,
         " windows of ", options.context, "; ", windows.held_out,
         " of them are held out (--eval-windows) and at least ",
         "one is needed to train on: shorten --context or bring more text");
  }
  return windows;
}

void dump_gradients(const std::string& path, const StepResult& result, const Adapter& adapter) {
  const std::vector<Adapter::Gradient> gradients = adapter.gradients();
  std::vector<NamedTensor> tensors;
  for (const auto& [name, shape, values] : gradients) tensors.push_back({name, LEMO_F32, shape, values.data()});
  const auto loss = static_cast<float>(result.loss);
  tensors.push_back({"loss", LEMO_F32, {1}, &loss});
  for (size_t i = 0; i < result.lists.size(); ++i) {
    const Kept& kept = *result.lists[i];
    tensors.push_back({"rows." + std::to_string(i), LEMO_I32, {kept.count}, kept.on_host.data()});
  }
  write_safetensors(path, tensors);
}

double held_out_loss(Backend& backend, const Model& model, const Selector& selector, const Windows& windows) {
  double sum = 0;
  for (int64_t i = 0; i < windows.held_out; ++i) {
    sum += evaluate(backend, model, selector, windows.held_out_window(i), windows.context);
  }
  const double mean = sum / static_cast<double>(windows.held_out);
  if (!std::isfinite(mean)) fail("the held-out loss is ", mean, ": a weight of the model or the adapter is not finite");
  return mean;
}

void train(const CommandLine& options, Backend& backend, const Model& model, Adapter& adapter, Selector& selector,
           const Windows& windows) {
  AdamW settings;
  settings.learning_rate = static_cast<float>(options.learning_rate);
  for (int64_t step = 0; step < options.steps; ++step) {
    const auto begin = std::chrono::steady_clock::now();
    const bool dense = step >= options.steps - options.dense_steps;
    selector.begin(step, dense);
    adapter.zero_gradients();
    const StepResult result = train_step(backend, model, selector, windows.training_window(step), windows.context);
    if (!std::isfinite(result.loss)) fail("step ", step + 1, ": the loss is ", result.loss, "; lower --lr");
    if (step == 0 && !options.dump_gradients.empty()) dump_gradients(options.dump_gradients, result, adapter);
    const double norm = adapter.step(settings);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    std::printf("step %lld/%lld  %s  loss %.6f  kept %.3f  gradient %.4f  %.0f tokens/s\n",
                static_cast<long long>(step + 1), static_cast<long long>(options.steps), dense ? "dense" : "skip ",
                result.loss, result.kept, norm, static_cast<double>(windows.context) / seconds.count());
    std::fflush(stdout);
  }
}

// What would keep the adapter from being saved is found before the training, not after it.
void prepare_output(const std::string& out) {
  namespace fs = std::filesystem;
  std::error_code error;
  if (fs::symlink_status(out, error).type() != fs::file_type::not_found) {
    if (error) fail("--out: ", out, ": ", error.message());
    fail("--out: ", out, " exists already; choose another folder");
  }
  fs::create_directories(fs::absolute(out).lexically_normal().parent_path(), error);
  if (error) fail("--out: the folder of ", out, " cannot be made: ", error.message());
}

void run(const CommandLine& options) {
  if (!options.out.empty()) prepare_output(options.out);
  const Config config = Config::read(options.model);
  if (options.context > config.max_positions) {
    fail("--context: the model has ", config.max_positions, " positions (max_position_embeddings), got ",
         options.context);
  }
  const Windows windows = read_windows(options, config);
  const auto backend = options.cuda ? make_cuda_backend() : make_cpu_backend(options.threads);
  Model model = Model::load(*backend, options.model, options.context);
  const Adapter::Options fresh{options.rank, options.alpha, options.targets, options.seed, options.model};
  Adapter adapter = options.adapter.empty() ? Adapter::create(*backend, model, fresh)
                                            : Adapter::load(*backend, model, options.adapter, options.model);
  Selector selector(*backend, model, options.selection, options.context);
  std::printf("%lld layers, %zu tokens, %lld windows of %lld to train on, %lld held out\n",
              static_cast<long long>(config.layers), windows.tokens.size(), static_cast<long long>(windows.training),
              static_cast<long long>(windows.context), static_cast<long long>(windows.held_out));

  const bool evaluates = windows.held_out > 0;
  if (evaluates) std::printf("held-out loss before  %.6f\n", held_out_loss(*backend, model, selector, windows));
  train(options, *backend, model, adapter, selector, windows);
  if (evaluates && options.steps > 0) {
    std::printf("held-out loss after   %.6f\n", held_out_loss(*backend, model, selector, windows));
  }
  if (options.out.empty()) {
    std::printf("no --out: the adapter is not saved\n");
  } else {
    adapter.save(options.out);
    std::printf("adapter saved in %s\n", options.out.c_str());
  }
}

}  // namespace
}  // namespace trainer

int main(int count, char** arguments) {
  try {
    if (const auto options = trainer::parse_command_line(count, arguments)) trainer::run(*options);
    return 0;
  } catch (const std::exception& error) {
    std::fflush(stdout);
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
