#include "ref/parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace lemo::ref {
namespace {

constexpr int kMaxThreads = 1024;
constexpr std::chrono::milliseconds kPollInterval(50);

using Clock = std::chrono::steady_clock;

int available_cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// Ends a task whose result is no longer needed.
struct Stopped {};

struct Job {
  Job(const lemo_exec& exec, int64_t count, TaskRef task) : exec(exec), count(count), task(task) {}

  const lemo_exec& exec;
  int64_t count;
  TaskRef task;
  int workers = 0;  // workers that may still join; the pool's mutex guards it
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;

  // Catches what is being thrown and ends the job.
  void fail() {
    if (!failed.exchange(true)) error = std::current_exception();
    next = count;
  }

  void work(int worker);
};

// What poll() needs to know about the job this thread works on.
struct Here {
  Job* job = nullptr;
  bool caller = false;  // this thread may call exec.cancel
};
thread_local Here here;
thread_local Clock::time_point next_poll;

// Sets `here` for a scope. Jobs nest if exec.cancel itself runs an operation.
class Enter {
 public:
  Enter(Job& job, bool caller) : before_(here) { here = {&job, caller}; }
  ~Enter() { here = before_; }
  Enter(const Enter&) = delete;
  Enter& operator=(const Enter&) = delete;

 private:
  Here before_;
};

void Job::work(int worker) {
  for (int64_t i = next++; i < count; i = next++) {
    try {
      poll();
      task(i, worker);
    } catch (...) {
      fail();
    }
  }
}

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
        // The system has no more threads: the existing ones do the work.
      } catch (const std::bad_alloc&) {
        // Nor memory for them.
      }
      job.workers = std::min(workers, size_);
      job_ = &job;
    }
    wake_.notify_all();
    job.work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;  // late workers must no longer join
    wait(lock, job);
    return true;
  }

 private:
  // Waits until no worker is left, and wakes up now and then to ask whether to cancel.
  void wait(std::unique_lock<std::mutex>& lock, Job& job) {
    const auto finished = [this] { return active_ == 0; };
    if (job.exec.cancel == nullptr) {
      done_.wait(lock, finished);
      return;
    }
    // The system's clock, which thread checkers follow; if it is set back, only polling is late.
    while (!done_.wait_until(lock, std::chrono::system_clock::now() + kPollInterval, finished)) {
      lock.unlock();
      try {
        poll();
      } catch (...) {
        job.fail();
      }
      lock.lock();
    }
  }

  void loop() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [this] { return job_ != nullptr && job_->workers > 0; });
      Job& job = *job_;
      const int worker = job.workers--;
      ++active_;
      lock.unlock();
      {
        const Enter enter(job, false);
        job.work(worker);
      }
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
// starts a separate pool. NULL if there is no memory for one.
Pool* pool() {
  Pool* current = the_pool.load();
  if (current != nullptr) return current;
#if defined(__linux__)
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr); }); });
#endif
  Pool* fresh = new (std::nothrow) Pool();
  if (the_pool.compare_exchange_strong(current, fresh)) return fresh;
  delete fresh;
  return current;
}

}  // namespace

void begin_polling() { next_poll = Clock::now() + kPollInterval; }

void poll() {
  Job* job = here.job;
  if (job == nullptr) return;
  if (job->failed.load(std::memory_order_relaxed)) throw Stopped();
  if (!here.caller || job->exec.cancel == nullptr || Clock::now() < next_poll) return;
  const bool cancelled = job->exec.cancel(job->exec.cancel_context) != 0;
  next_poll = Clock::now() + kPollInterval;
  if (cancelled) throw Error(LEMO_CANCELLED, "exec.cancel asked to stop; outputs hold no result");
}

int worker_count(const lemo_exec& exec, int64_t count) {
  static const int cores = available_cores();
  const int wanted = exec.num_threads > 0 ? std::min(exec.num_threads, kMaxThreads) : cores;
  return static_cast<int>(std::clamp<int64_t>(count, 1, wanted));
}

void run_tasks(const lemo_exec& exec, int64_t count, TaskRef task) {
  const int threads = worker_count(exec, count);
  const bool inside = here.job != nullptr;
  Job job(exec, count, task);
  const Enter enter(job, !inside || here.caller);
  Pool* workers = threads > 1 && !inside ? pool() : nullptr;
  if (workers == nullptr || !workers->run(job, threads - 1)) job.work(0);
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace lemo::ref
