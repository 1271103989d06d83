// A pool of threads for the CPU backend.
//
// Not OpenMP: the host process often brings its own copy of the OpenMP runtime (torch bundles libgomp), and two copies
// keep two sets of spinning threads. These never spin: workers sleep between calls, and a caller sleeps while it waits
// for the last of them. Work is cut into tasks by the shape of the problem alone and every result belongs to one task,
// so results do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

#include "lemo/types.h"
#include "src/checked.h"

namespace lemo::ref {

// A reference to a callable, so that passing it allocates nothing.
class TaskRef {
 public:
  template <class Task>
  explicit TaskRef(const Task& task)
      : task_(&task), call_([](const void* given, int64_t index, int worker) {
          const Task& callable = *static_cast<const Task*>(given);
          if constexpr (std::is_invocable_v<const Task&, int64_t, int>) {
            callable(index, worker);
          } else {
            callable(index);
          }
        }) {}
  void operator()(int64_t index, int worker) const { call_(task_, index, worker); }

 private:
  const void* task_;
  void (*call_)(const void*, int64_t, int);
};

void run_tasks(const lemo_exec& exec, int64_t count, TaskRef task);

// Runs task(0) .. task(count - 1), in any order, on up to exec.num_threads threads (0 = all cores given to this
// process), the caller included. A task may take the number of its worker as a second argument; no two tasks with the
// same number run at a time. Rethrows the first exception. A call from inside a task, or while another thread uses the
// pool, runs on the caller alone.
template <class Task>
void parallel_for(const lemo_exec& exec, int64_t count, const Task& task) {
  run_tasks(exec, count, TaskRef(task));
}

// The same over ranges of `grain` items: task(first, last), or task(first, last, worker).
template <class Task>
void parallel_ranges(const lemo_exec& exec, int64_t count, int64_t grain, const Task& task) {
  parallel_for(exec, count / grain + (count % grain != 0 ? 1 : 0), [&](int64_t i, int worker) {
    const int64_t first = i * grain, last = count - first < grain ? count : first + grain;
    if constexpr (std::is_invocable_v<const Task&, int64_t, int64_t, int>) {
      task(first, last, worker);
    } else {
      task(first, last);
    }
  });
}

// The most workers that `count` tasks get.
int worker_count(const lemo_exec& exec, int64_t count);

// Memory for every worker, taken before the first output is written: a call that runs out of memory has then changed
// nothing. Not initialized.
class Scratch {
 public:
  Scratch(const lemo_exec& exec, int64_t count, const char* name, Size floats) : each_((floats + 15).count(name)) {
    memory_.reset(new float[static_cast<size_t>((Size(worker_count(exec, count)) * each_).count(name))]);
  }
  float* of(int worker) const { return memory_.get() + worker * each_; }

 private:
  int64_t each_;  // floats of a worker; a few more than asked for keep workers out of each other's cache lines
  std::unique_ptr<float[]> memory_;
};

// Called between the steps of a task, so that a long task can end early: throws LEMO_CANCELLED once exec.cancel has
// asked for it, and ends the task if another task of the call has failed. exec.cancel is called by the caller's thread
// only, and rarely (kPollInterval), since it may wait for one of the host's locks.
void poll();

// Starts an operation on the calling thread: exec.cancel is not called before kPollInterval has passed.
void begin_polling();

}  // namespace lemo::ref
