// Random calls of the C interface, right and wrong ones, meant to be built with sanitizers.
//
//   fuzz SEED ITERATIONS        ITERATIONS = 0: until SIGALRM ends it (make fuzz)
//
// Arguments are valid at first (operations.h), in memory of exact size; most calls then have one to three of them
// changed: a size, a stride, a type, a pointer, a number, an index, a struct size, the workspace. What has to hold:
//   - a valid call is accepted, its numbers are finite, and it gives the same bits with another number of threads;
//   - an accepted call writes elements of its outputs and nothing else;
//   - a refused call has changed nothing, for whatever reason it was refused, out of memory included;
//   - the sanitizers report nothing.
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <iterator>
#include <map>
#include <new>

#include "operations.h"
#include "src/fields.h"

// Allocations of the library that fail on demand.
void* operator new(size_t size) {
  int64_t left = fuzz::allocations_left.load();
  while (left > 0 && !fuzz::allocations_left.compare_exchange_weak(left, left - 1)) {
  }
  void* memory = left == 0 ? nullptr : std::malloc(std::max<size_t>(size, 1));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
void* operator new[](size_t size) { return operator new(size); }
void* operator new(size_t size, const std::nothrow_t&) noexcept {
  try {
    return operator new(size);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }

namespace fuzz {
namespace {

volatile std::sig_atomic_t stopped = 0;
std::map<std::string, std::map<lemo_status, int64_t>> counts;

template <class Args>
class Trial {
 public:
  explicit Trial(uint64_t seed) : seed_(seed), random_(seed), memory_(random_) {
    exec_.struct_size = sizeof(exec_);
    exec_.num_threads = static_cast<int32_t>(random_.in(1, 3));
    if (random_.once_in(2)) exec_.cancel = [](void*) { return int32_t{0}; };
    args_.struct_size = sizeof(args_);
    fill(random_, memory_, args_);
  }

  void run() {
    const int64_t changes = random_.once_in(4) ? 0 : random_.in(1, 3);
    for (int64_t i = 0; i < changes; ++i) change();
    give_workspace(changes > 0);
    memory_.remember();
    const lemo_status status = Operation<Args>::run(&exec_, &args_);
    ++counts[Operation<Args>::name][status];
    if (status != LEMO_OK) {
      if (changes == 0) fail("a valid call was refused");
      if (*lemo_last_error() == '\0') fail("no message");
      if (memory_.changed()) fail("a refused call has changed something");
      return;
    }
    if (memory_of_its_own()) check_writes();
    if (changes > 0) return;
    check_finite();
    check_threads();
    if (random_.once_in(8)) check_out_of_memory();
  }

 private:
  [[noreturn]] void fail(const char* what) {
    std::fprintf(stderr, "%s, seed %llu: %s; last error: %s\n", Operation<Args>::name,
                 static_cast<unsigned long long>(seed_), what, lemo_last_error());
    std::abort();
  }

  template <class Visit>
  void outputs(Visit&& visit) {
    lemo::for_each_tensor(args_, [&](lemo::FieldRole role, const char*, lemo_tensor& t) {
      if (t.ndim > 0 && lemo::is_output(role)) visit(t);
    });
  }

  // Numbers that a caller might come up with. Sizes are either small or beyond every memory: what lies between would be
  // accepted, since the library cannot know how much memory there is.
  int64_t size() {
    return random_.one_of<int64_t>(
        {-1, 0, 1, 2, 3, random_.in(0, 40), int64_t{1} << 61, int64_t{1} << 62, INT64_MAX, INT64_MIN});
  }

  void change() {
    const int64_t what = random_.in(0, 9);
    if (what == 0) return change_exec();
    if (what == 1) return change_numbers();
    std::vector<lemo_tensor*> all;
    lemo::for_each_tensor(args_, [&](lemo::FieldRole, const char*, lemo_tensor& t) { all.push_back(&t); });
    const auto any = [&]() -> lemo_tensor& {
      return *all[static_cast<size_t>(random_.in(0, static_cast<int64_t>(all.size()) - 1))];
    };
    lemo_tensor& t = any();
    const int64_t dim = random_.in(0, LEMO_MAX_DIMS - 1);
    bool place = true;
    switch (what) {
      case 2:
        t.shape[dim] = size();
        break;
      case 3:
        t.stride[dim] = size();
        break;
      case 4:
        t.shape[dim] = size();
        t.stride[random_.in(0, 2)] = 0;
        break;
      case 5:
        t.ndim = random_.one_of<int32_t>({0, 1, 2, 3, 4, 5, -1, 77, INT32_MIN});
        break;
      case 6:
        t.dtype = random_.one_of<int32_t>({0, 1, 2, 3, 4, 5, 6, -1, INT32_MAX});
        break;
      case 7:  // an index, or a value such as NaN
        change_contents(t);
        place = false;
        break;
      case 8:  // no memory, or a misaligned address, which bytes do not have
        t.data =
            random_.once_in(2) || t.data == nullptr || t.dtype == LEMO_U8 ? nullptr : static_cast<char*>(t.data) + 1;
        place = false;
        break;
      default:
        t = any();  // another tensor's memory
        place = false;
    }
    if (place) memory_.place(t);
  }

  void change_contents(const lemo_tensor& t) {
    if (span_of(t) <= 0 || t.data == nullptr || memory_.find(t.data) == nullptr) return;
    Block& block = *memory_.find(t.data);
    const size_t width = t.dtype == LEMO_I64 ? 8 : 4;
    if (block.size < width) return;
    const int64_t value = random_.one_of<int64_t>({-2, -1, 0, 1, random_.in(0, 50), INT32_MAX, INT32_MIN, 0x7FC00000});
    const auto slots = static_cast<int64_t>(block.size / width);
    std::memcpy(block.bytes + static_cast<size_t>(random_.in(0, slots - 1)) * width, &value, width);
  }

  void change_exec() {
    switch (random_.in(0, 5)) {
      case 0:
        exec_.struct_size = static_cast<uint64_t>(random_.in(0, sizeof(exec_)));
        break;
      case 1:
        exec_.device = random_.one_of<int32_t>({-1, 1, 2});
        break;
      case 2:
        exec_.num_threads = random_.one_of<int32_t>({-1, 0, 64, INT32_MIN});
        break;
      case 3:
        exec_.deterministic = random_.one_of<int32_t>({-1, 1, 2});
        break;
      case 4:
        args_.struct_size = static_cast<uint64_t>(random_.in(0, sizeof(args_)));
        break;
      default:
        exec_.deterministic = 1;
    }
  }

  // A number of the struct, between the tensors: flags, modes, scales, reserved fields.
  void change_numbers() {
    std::vector<bool> number(sizeof(args_) / 4, true);
    number[0] = number[1] = false;
    lemo::for_each_tensor(args_, [&](lemo::FieldRole, const char*, lemo_tensor& t) {
      const auto at = static_cast<size_t>(reinterpret_cast<char*>(&t) - reinterpret_cast<char*>(&args_));
      for (size_t i = at / 4; i < (at + sizeof(t)) / 4; ++i) number[i] = false;
    });
    std::vector<size_t> places;
    for (size_t i = 0; i < number.size(); ++i) {
      if (number[i]) places.push_back(i * 4);
    }
    if (places.empty()) return;
    const int32_t value = random_.one_of<int32_t>(
        {-1, 0, 1, 2, 3, 1 << 20, INT32_MAX, INT32_MIN, 0x7FC00000, 0x7F800000, static_cast<int32_t>(0xBF800000)});
    const size_t at = places[static_cast<size_t>(random_.in(0, static_cast<int64_t>(places.size()) - 1))];
    std::memcpy(reinterpret_cast<char*>(&args_) + at, &value, 4);
  }

  // Exactly as much as was asked for; now and then less, none, or askew.
  void give_workspace(bool wrong) {
    uint64_t bytes = 0;
    if (Operation<Args>::workspace(&exec_, &args_, &bytes) != LEMO_OK || bytes == 0 || bytes > (1 << 26)) return;
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, bytes + 4) != 0) std::abort();
    std::free(workspace_);
    workspace_ = std::realloc(memory, bytes);
    if (reinterpret_cast<uintptr_t>(workspace_) % 64 != 0) {  // realloc may move
      std::free(workspace_);
      if (posix_memalign(&workspace_, 256, bytes) != 0) std::abort();
    }
    exec_.workspace = workspace_;
    exec_.workspace_size = bytes;
    if (!wrong || !random_.once_in(10)) return;
    if (random_.once_in(2)) {
      exec_.workspace_size = bytes - 1;
    } else {
      exec_.workspace = random_.once_in(2) ? nullptr : static_cast<char*>(workspace_) + 4;
    }
  }

  // Whether no output shares memory with another tensor.
  bool memory_of_its_own() {
    std::map<Block*, int> users;
    bool shared = false;
    lemo::for_each_tensor(args_, [&](lemo::FieldRole, const char*, lemo_tensor& t) {
      if (t.ndim > 0 && t.data != nullptr) shared = ++users[memory_.find(t.data)] > 1 || shared;
    });
    return !shared;
  }

  void check_writes() {
    lemo::for_each_tensor(args_, [&](lemo::FieldRole role, const char* name, lemo_tensor& t) {
      Block* block = t.ndim > 0 && t.data != nullptr ? memory_.find(t.data) : nullptr;
      if (block == nullptr || span_of(t) <= 0) return;
      if (lemo::is_output(role) ? gaps_changed(t, *block) : block->changed()) fail(name);
    });
  }

  // Whether the value is the LSE of a query without keys.
  bool sees_nothing(const lemo_tensor& t, float value) const {
    if constexpr (std::is_same_v<Args, lemo_attention_forward_args>) {
      return &t == &args_.lse && args_.cu_seqlens_k.ndim != 0 && value < 0 && std::isinf(value);
    }
    return (void)t, (void)value, false;
  }

  void check_finite() {
    outputs([&](lemo_tensor& t) {
      if (t.dtype != LEMO_F32 || t.data == nullptr) return;
      const Block& block = *memory_.find(t.data);
      for (size_t i = 0; i < block.size / 4; ++i) {
        const float value = reinterpret_cast<const float*>(block.bytes)[i];
        if (!std::isfinite(value) && !sees_nothing(t, value)) fail("a result that is not finite");
      }
    });
  }

  std::vector<unsigned char> results() {
    std::vector<unsigned char> all;
    outputs([&](lemo_tensor& t) {
      const Block* block = t.data == nullptr ? nullptr : memory_.find(t.data);
      if (block != nullptr) all.insert(all.end(), block->bytes, block->bytes + block->size);
    });
    return all;
  }

  void check_threads() {
    const std::vector<unsigned char> before = results();
    memory_.restore();
    const lemo_exec other = with_threads(exec_.num_threads % 3 + 1);
    if (Operation<Args>::run(&other, &args_) != LEMO_OK) fail("refused with other threads");
    if (results() != before) fail("other results with other threads");
  }

  lemo_exec with_threads(int32_t threads) const {
    lemo_exec other = exec_;
    other.num_threads = threads;
    return other;
  }

  void check_out_of_memory() {
    for (int64_t allowed = 0;; ++allowed) {
      memory_.restore();
      allocations_left = allowed;
      const lemo_status status = Operation<Args>::run(&exec_, &args_);
      allocations_left = -1;
      ++counts[Operation<Args>::name][status];
      if (status == LEMO_OK) return;
      if (status != LEMO_BACKEND_ERROR) fail("out of memory, but another status");
      if (memory_.changed()) fail("out of memory, but something has changed");
    }
  }

 public:
  ~Trial() { std::free(workspace_); }
  Trial(const Trial&) = delete;
  Trial& operator=(const Trial&) = delete;

 private:
  uint64_t seed_;
  Random random_;
  Memory memory_;
  lemo_exec exec_ = {};
  Args args_ = {};
  void* workspace_ = nullptr;
};

// The operations take turns.
void run_one_of(uint64_t seed) {
#define FUZZ_TRIAL(op) [](uint64_t own) { Trial<lemo_##op##_args>(own).run(); },
  static constexpr void (*kTrials[])(uint64_t) = {LEMO_OPERATIONS(FUZZ_TRIAL, FUZZ_TRIAL)};
#undef FUZZ_TRIAL
  kTrials[seed % std::size(kTrials)](seed);
}

void print() {
  for (const auto& [name, statuses] : counts) {
    std::printf("%-22s", name.c_str());
    for (const auto& [status, count] : statuses) {
      std::printf("  %s %lld", lemo_status_string(status), static_cast<long long>(count));
    }
    std::printf("\n");
  }
}

}  // namespace
}  // namespace fuzz

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s SEED ITERATIONS\n", argv[0]);
    return 2;
  }
  const uint64_t first = std::strtoull(argv[1], nullptr, 10), count = std::strtoull(argv[2], nullptr, 10);
  std::signal(SIGALRM, [](int) { fuzz::stopped = 1; });
  if (const char* seconds = std::getenv("FUZZ_SECONDS"))
    alarm(static_cast<unsigned>(std::strtoul(seconds, nullptr, 10)));
  uint64_t seed = first;
  for (; (count == 0 || seed - first < count) && fuzz::stopped == 0; ++seed) fuzz::run_one_of(seed);
  fuzz::print();
  std::printf("%llu trials, seeds %llu to %llu: nothing found\n", static_cast<unsigned long long>(seed - first),
              static_cast<unsigned long long>(first), static_cast<unsigned long long>(seed - 1));
  return 0;
}
