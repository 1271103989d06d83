// How rows are distributed over threads, for all kernels that work on rows.
#pragma once

#include <string>
#include <type_traits>

#include "common/check.h"
#include "common/vector.cuh"

namespace lemo::cuda {

constexpr int kRowBlock = 128;  // threads of a block whose rows take one warp each

// Where nothing is summed over a row, a warp takes a chunk of it, kChunk vectors per lane: enough loads in flight for
// narrow and wide rows alike.
constexpr int kLanes = 32;

struct Place {
  int64_t row;
  int64_t first;  // vector; the others of the lane follow in steps of kLanes
};

template <int kChunk>
__device__ __forceinline__ Place place(int64_t chunks) {
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kRowBlock + threadIdx.x) / kLanes;
  const int64_t row = warp / chunks;
  return {row, (warp - row * chunks) * (kChunk * kLanes) + threadIdx.x % kLanes};
}

struct Grid {
  int64_t vectors, chunks;  // of a row
  unsigned blocks;
};

inline unsigned block_count(const char* name, int64_t blocks) {
  if (blocks >= int64_t{1} << 31) {
    throw Error(LEMO_UNSUPPORTED, std::string(name) + ": too many elements for one launch on CUDA");
  }
  return static_cast<unsigned>(blocks);
}

template <int kChunk>
Grid grid_for(const char* name, int64_t m, int64_t d) {
  const int64_t vectors = d / kVector;
  const int64_t chunks = ceil_div(vectors, kChunk * kLanes);
  return {vectors, chunks, block_count(name, ceil_div(m * chunks, kRowBlock / kLanes))};
}

inline void check_parameter(const char* name, const lemo_tensor& t) {
  if (present(t) && reinterpret_cast<uintptr_t>(t.data) % 16 != 0) {
    throw Error(LEMO_INVALID_ARGUMENT, std::string(name) + ": expected data aligned to 16 bytes on CUDA");
  }
}

// A row is held in registers: kVectors vectors of each of kThreads threads.
template <int kThreadsPerRow, int kVectorsPerThread>
struct RowShape {
  static constexpr int kThreads = kThreadsPerRow;
  static constexpr int kVectors = kVectorsPerThread;
  static constexpr int kBlock = kThreads > 32 ? kThreads : kRowBlock;
  static constexpr int kRowsPerBlock = kBlock / kThreads;
};

// Calls f with the smallest RowShape that holds d elements. At most four vectors a thread, so that two copies of a row
// stay in registers; one warp up to d = 1024, where no barrier is needed, and a block beyond.
template <class Function>
void dispatch_width(const char* name, int64_t d, Function&& f) {
  if (d <= 256) return f(RowShape<32, 1>{});
  if (d <= 512) return f(RowShape<32, 2>{});
  if (d <= 1024) return f(RowShape<32, 4>{});
  if (d <= 2048) return f(RowShape<128, 2>{});
  if (d <= 4096) return f(RowShape<128, 4>{});
  if (d <= 8192) return f(RowShape<256, 4>{});
  if (d <= 16384) return f(RowShape<512, 4>{});
  throw Error(LEMO_UNSUPPORTED, std::string(name) + ": expected d of at most 16384 on CUDA, got " + std::to_string(d));
}

}  // namespace lemo::cuda
