// A pool of threads for the CPU backend.
//
// Not OpenMP: the host process often brings its own copy of the OpenMP runtime (torch bundles libgomp), and two copies
// keep two sets of spinning threads. Our workers sleep between calls. Work is cut into tasks by the shape of the
// problem alone and every result belongs to one task, so results do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <functional>

#include "lemo/types.h"

namespace lemo::ref {

// Runs task(0) .. task(count - 1), in any order, on up to exec.num_threads threads (0 = all cores given to this
// process), the caller included. Rethrows the first exception. A call from inside a task, or while another thread
// uses the pool, runs on the caller alone.
void parallel_for(const lemo_exec& exec, int64_t count, const std::function<void(int64_t)>& task);

// The same over ranges of `grain` items: task(first, last).
void parallel_ranges(const lemo_exec& exec, int64_t count, int64_t grain,
                     const std::function<void(int64_t, int64_t)>& task);

}  // namespace lemo::ref
