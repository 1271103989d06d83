// Fork and join on the CPU.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace trainer {

// body(i) for i in [0, n), on up to `threads` threads that take the next i as they become free. A thread costs some
// 20 us to start, so callers hand over pieces of at least a millisecond. body must not throw.
template <class Body>
void parallel_for(int threads, int64_t n, const Body& body) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) body(i);
  };
  std::vector<std::thread> others;
  for (int64_t t = 1; t < std::min<int64_t>(threads, n); ++t) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace trainer
