#include "ref/parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace lemo::ref {
namespace {

constexpr int kMaxThreads = 1024;

int available_cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

struct Job {
  const std::function<void(int64_t)>* task;
  int64_t count;
  int workers;  // workers that may still join
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;

  void work() {
    for (int64_t i = next++; i < count; i = next++) {
      try {
        (*task)(i);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
        next = count;
      }
    }
  }
};

class Pool {
 public:
  // False if the pool is busy: the caller then works alone.
  bool run(Job& job, int workers) {
    std::unique_lock<std::mutex> alone(entry_, std::try_to_lock);
    if (!alone.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      try {
        for (; size_ < workers; ++size_) std::thread([this] { loop(); }).detach();
      } catch (const std::system_error&) {
        // The system gives no more threads: work with those there are.
      }
      job.workers = std::min(workers, size_);
      job_ = &job;
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;  // late workers must not join any more
    done_.wait(lock, [this] { return active_ == 0; });
    return true;
  }

 private:
  void loop() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [this] { return job_ != nullptr && job_->workers > 0; });
      Job& job = *job_;
      --job.workers;
      ++active_;
      lock.unlock();
      job.work();
      lock.lock();
      if (--active_ == 0) done_.notify_all();
    }
  }

  std::mutex entry_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  Job* job_ = nullptr;
  int active_ = 0;
  int size_ = 0;
};

std::atomic<Pool*> the_pool{nullptr};

// Never destroyed: workers may outlive static destructors. A forked child has none of the parent's threads, so it
// starts a pool of its own.
Pool& pool() {
  Pool* current = the_pool.load();
  if (current != nullptr) return *current;
#if defined(__linux__)
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr); }); });
#endif
  Pool* fresh = new Pool();
  if (the_pool.compare_exchange_strong(current, fresh)) return *fresh;
  delete fresh;
  return *current;
}

thread_local bool inside_task = false;

}  // namespace

void parallel_for(const lemo_exec& exec, int64_t count, const std::function<void(int64_t)>& task) {
  static const int cores = available_cores();
  const int wanted = exec.num_threads > 0 ? std::min(exec.num_threads, kMaxThreads) : cores;
  const int threads = static_cast<int>(std::min<int64_t>(wanted, count));
  if (threads <= 1 || inside_task) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  const std::function<void(int64_t)> marked = [&](int64_t i) {
    inside_task = true;
    struct Leave {
      ~Leave() { inside_task = false; }
    } leave;
    task(i);
  };
  Job job;
  job.task = &marked;
  job.count = count;
  if (!pool().run(job, threads - 1)) job.work();
  if (job.error) std::rethrow_exception(job.error);
}

void parallel_ranges(const lemo_exec& exec, int64_t count, int64_t grain,
                     const std::function<void(int64_t, int64_t)>& task) {
  parallel_for(exec, (count + grain - 1) / grain,
               [&](int64_t i) { task(i * grain, std::min(count, (i + 1) * grain)); });
}

}  // namespace lemo::ref
