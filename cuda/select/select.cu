// Choosing blocks on the device, in two or three launches and no host synchronisation:
//   choose_blocks   one thread block per document: ranks, radix select of the k-th one (ties to the lower block), flags
//   pack_blocks     one thread block: prefix sums over the kept blocks -> slots, offsets, counts; with one document the
//                   thread block that chose does this too
//   write_rows      one warp per block: its tokens -> rows, row_slots
#include <algorithm>
#include <cub/block/block_scan.cuh>

#include "common/check.h"
#include "kernels.h"
#include "src/hash.h"

namespace lemo::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr float kCertain = 0.999f;  // from this probability on SAMPLE always draws a block
constexpr int kCached = 2048;       // ranks of a document up to this length stay in shared memory
constexpr int kItems = 4;           // blocks per thread and step of pack_blocks

// Flags of a block, set by choose_blocks.
constexpr int32_t kKept = 1;
constexpr int32_t kWeighted = 2;  // weighs 1 / score rather than 1
constexpr int32_t kBad = 4;       // its score is invalid

struct Problem {
  const float* scores;
  const int32_t* offsets;
  const int32_t* documents;
  int num_blocks, num_documents, num_tokens;
  int mode;
  float keep, threshold;
  int always_first, always_last;
  uint64_t seed;

  uint64_t* ranks;  // [num_blocks], small = taken first; of documents that are not cached
  int32_t* flags;   // [num_blocks]
  int32_t* packed;  // [num_blocks + 1]: kept tokens before the block

  int32_t *kept, *slots, *row_offsets, *cu_seqlens, *rows, *row_slots, *info;
  float* weights;
};

// Maps doubles to integers of the same order.
__device__ uint64_t sortable(double x) {
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(x + 0.0));  // -0 and 0 are a tie
  return bits >> 63 ? ~bits : bits | (uint64_t{1} << 63);
}

using Scan = cub::BlockScan<unsigned long long, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;

struct ChooseShared {
  uint64_t ranks[kCached];
  int histograms[8][256];
  int byte, remaining, all;
};
union Shared {
  ChooseShared choose;
  typename Scan::TempStorage scan;
  int first_bad, longest;
};

// By one warp: the bin of `histogram` that holds the remaining-th element.
__device__ void find_bin(const int* histogram, int remaining, ChooseShared& shared) {
  constexpr int kBins = 8;
  const int lane = threadIdx.x;
  int counts[kBins], sum = 0;
#pragma unroll
  for (int i = 0; i < kBins; ++i) sum += counts[i] = histogram[lane * kBins + i];
  int before = sum;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, before, step);
    if (lane >= step) before += other;
  }
  before -= sum;
  if (before >= remaining || remaining > before + sum) return;
  int left = remaining - before, bin = 0;
  bool found = false;
#pragma unroll
  for (int i = 0; i < kBins; ++i) {
    if (!found && left <= counts[i]) {
      found = true;
      bin = i;
      shared.all = left == counts[i];
    }
    if (!found) left -= counts[i];
  }
  shared.byte = lane * kBins + bin;
  shared.remaining = left;
}

// Flags the k smallest of n ranks; of those that tie with the k-th, the lower blocks.
__device__ void keep_smallest(const Problem& p, const uint64_t* ranks, int first, int n, int k, ChooseShared& shared) {
  // The k-th smallest rank, one byte at a time from the top: `remaining` blocks are still to be found among those that
  // share the bytes fixed so far, until all of them are wanted.
  uint64_t prefix = 0;
  int remaining = k, shift = 56;
  bool all = false;
  for (;; shift -= 8) {
    int* histogram = shared.histograms[shift / 8];
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const uint64_t rank = ranks[i];
      const bool shares = shift == 56 || (rank >> (shift + 8)) == (prefix >> (shift + 8));
      if (shares) atomicAdd(&histogram[(rank >> shift) & 255], 1);
    }
    __syncthreads();
    if (threadIdx.x < 32) find_bin(histogram, remaining, shared);
    __syncthreads();
    prefix |= static_cast<uint64_t>(shared.byte) << shift;
    remaining = shared.remaining;
    all = shared.all != 0;
    if (all || shift == 0) break;
  }
  if (all) {
    for (int i = threadIdx.x; i < n; i += kThreads) {
      if (ranks[i] >> shift <= prefix >> shift) p.flags[first + i] |= kKept;
    }
    return;
  }

  // Every block below the k-th rank, and the first `remaining` of those that tie with it.
  __shared__ typename Scan::TempStorage scan;
  int ties_before = 0;
  for (int base = 0; base < n; base += kThreads) {
    const int i = base + static_cast<int>(threadIdx.x);
    const uint64_t rank = i < n ? ranks[i] : ~uint64_t{0};
    const bool tie = i < n && rank == prefix;
    unsigned long long before, total;
    Scan(scan).ExclusiveSum(static_cast<unsigned long long>(tie), before, total);
    if (i < n && (rank < prefix || (tie && ties_before + static_cast<int>(before) < remaining))) {
      p.flags[first + i] |= kKept;
    }
    ties_before += static_cast<int>(total);
    __syncthreads();
  }
}

__device__ void choose(const Problem& p, int document, Shared& storage) {
  ChooseShared& shared = storage.choose;
  const int first = p.documents[document], last = p.documents[document + 1], n = last - first;
  const int forced_blocks = min(n, p.always_first + p.always_last);
  const int wanted = static_cast<int>(floor(static_cast<double>(p.keep) * n + 0.5));
  const int k = min(n, max(max(wanted, forced_blocks), 1));
  const bool sample = p.mode == LEMO_SELECT_SAMPLE, poisson = p.mode == LEMO_SELECT_POISSON;
  const bool threshold = p.mode == LEMO_SELECT_THRESHOLD;
  uint64_t* ranks = n <= kCached ? shared.ranks : p.ranks + first;

  for (int i = threadIdx.x; i < 8 * 256; i += kThreads) shared.histograms[0][i] = 0;
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const float score = p.scores[first + i];
    const bool bad = !isfinite(score) || ((sample || poisson) && !(score > 0.0f && score <= 1.0f));
    const bool always = i < p.always_first || n - i <= p.always_last;
    double rank = -static_cast<double>(score);
    if (sample && score >= kCertain) {
      rank = -1.0;
    } else if (sample) {
      const double u = hash_uniform(p.seed, static_cast<uint64_t>(first + i)), q = score;
      rank = (u / (1.0 - u)) / (q / (1.0 - q));
    }
    if (!threshold && !poisson) ranks[i] = always ? 0 : sortable(rank);
    const bool drawn = poisson && hash_uniform(p.seed, static_cast<uint64_t>(first + i)) < static_cast<double>(score);
    const bool kept = drawn || (threshold && score >= p.threshold) || (always && (threshold || poisson));
    p.flags[first + i] = (bad ? kBad : 0) | (poisson && !always ? kWeighted : 0) | (kept ? kKept : 0);
  }
  __syncthreads();
  if (threshold || poisson) return;

  keep_smallest(p, ranks, first, n, k, shared);
}

// Kept blocks in the upper half, their tokens in the lower.
__device__ unsigned long long count_of(int blocks, int tokens) {
  return static_cast<unsigned long long>(blocks) << 32 | static_cast<unsigned long long>(tokens);
}
__device__ int blocks_of(unsigned long long count) { return static_cast<int>(count >> 32); }
__device__ int tokens_of(unsigned long long count) { return static_cast<int>(count & 0xffffffffu); }

__device__ void pack(const Problem& p, Shared& storage) {
  int first_bad = p.num_blocks;
  for (int block = threadIdx.x; block < p.num_blocks; block += kThreads) {
    if ((p.flags[block] & kBad) != 0) first_bad = min(first_bad, block);
  }
  if (threadIdx.x == 0) storage.first_bad = p.num_blocks;
  const bool bad = __syncthreads_or(first_bad < p.num_blocks) != 0;
  if (bad) {
    atomicMin(&storage.first_bad, first_bad);
    __syncthreads();
    first_bad = storage.first_bad;
    __syncthreads();
  }
  unsigned long long done = 0;
  for (int base = 0; base < p.num_blocks; base += kThreads * kItems) {
    const int begin = base + static_cast<int>(threadIdx.x) * kItems;
    int32_t flags[kItems], starts[kItems + 1];
#pragma unroll
    for (int i = 0; i < kItems; ++i) flags[i] = !bad && begin + i < p.num_blocks ? p.flags[begin + i] : 0;
#pragma unroll
    for (int i = 0; i <= kItems; ++i) starts[i] = p.offsets[min(begin + i, p.num_blocks)];
    unsigned long long own = 0, before, total;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if ((flags[i] & kKept) != 0) own += count_of(1, starts[i + 1] - starts[i]);
    }
    Scan(storage.scan).ExclusiveSum(own, before, total);
    before += done;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int block = begin + i;
      if (block >= p.num_blocks) break;
      const bool kept = (flags[i] & kKept) != 0;
      const int slot = blocks_of(before);
      p.packed[block] = tokens_of(before);
      p.slots[block] = kept ? slot : -1;
      if (kept) {
        p.kept[slot] = block;
        p.row_offsets[slot] = tokens_of(before);
        p.weights[slot] = (flags[i] & kWeighted) != 0 ? 1.0f / p.scores[block] : 1.0f;
        before += count_of(1, starts[i + 1] - starts[i]);
      }
    }
    done += total;
    __syncthreads();
  }
  const int kept_blocks = blocks_of(done), kept_tokens = tokens_of(done);
  for (int i = kept_blocks + static_cast<int>(threadIdx.x); i <= p.num_blocks; i += kThreads) {
    p.row_offsets[i] = kept_tokens;
    if (i == p.num_blocks) break;
    p.kept[i] = -1;
    p.weights[i] = 0.0f;
  }
  if (threadIdx.x == 0) {
    p.packed[p.num_blocks] = kept_tokens;
    storage.longest = 0;
  }
  __syncthreads();  // makes this thread block's writes to `packed` visible to all its threads
  int longest = 0;
  for (int d = threadIdx.x; d <= p.num_documents; d += kThreads) {
    const int start = p.packed[p.documents[d]];
    p.cu_seqlens[d] = start;
    if (d < p.num_documents) longest = max(longest, p.packed[p.documents[d + 1]] - start);
  }
  if (longest > 0) atomicMax(&storage.longest, longest);
  __syncthreads();
  if (threadIdx.x == 0) {
    p.info[LEMO_INFO_KEPT_BLOCKS] = kept_blocks;
    p.info[LEMO_INFO_KEPT_ROWS] = kept_tokens;
    p.info[LEMO_INFO_LONGEST_DOCUMENT] = storage.longest;
    p.info[LEMO_INFO_FAULT] = bad ? first_bad + 1 : kept_blocks == 0 && p.mode != LEMO_SELECT_POISSON ? -1 : 0;
  }
}

__global__ void __launch_bounds__(kThreads) choose_blocks(const __grid_constant__ Problem p) {
  __shared__ Shared shared;
  choose(p, static_cast<int>(blockIdx.x), shared);
  if (gridDim.x > 1) return;
  __syncthreads();
  pack(p, shared);
}

__global__ void __launch_bounds__(kThreads) pack_blocks(const __grid_constant__ Problem p) {
  __shared__ Shared shared;
  pack(p, shared);
}

__global__ void write_rows(Problem p) {
  const int thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
  const int lane = threadIdx.x % 32;
  for (int block = thread / 32; block < p.num_blocks; block += threads / 32) {
    const int slot = p.slots[block];
    if (slot < 0) continue;
    const int start = p.offsets[block], tokens = p.offsets[block + 1] - start, to = p.packed[block];
    for (int i = lane; i < tokens; i += 32) {
      p.rows[to + i] = start + i;
      p.row_slots[to + i] = slot;
    }
  }
  for (int i = p.info[LEMO_INFO_KEPT_ROWS] + thread; i < p.num_tokens; i += threads) p.rows[i] = p.row_slots[i] = -1;
}

uint64_t layout(void* workspace, int64_t num_blocks, Problem& p) {
  Arena arena(workspace);
  p.ranks = arena.take<uint64_t>(num_blocks);
  p.flags = arena.take<int32_t>(num_blocks);
  p.packed = arena.take<int32_t>(num_blocks + 1);
  return arena.size();
}

}  // namespace

void select(const lemo_exec& exec, const lemo_select_args& a) {
  const DeviceGuard guard(exec.device_index);
  const cudaStream_t stream = stream_of(exec);
  Problem p{};
  layout(exec.workspace, a.scores.shape[0], p);
  p.scores = data<const float>(a.scores);
  p.offsets = data<const int32_t>(a.blocks.offsets);
  p.documents = data<const int32_t>(a.blocks.documents);
  p.num_blocks = static_cast<int>(a.scores.shape[0]);
  p.num_documents = static_cast<int>(a.blocks.documents.shape[0] - 1);
  p.num_tokens = static_cast<int>(a.rows.shape[0]);
  p.mode = a.mode;
  p.keep = a.keep;
  p.threshold = a.threshold;
  // No document has more blocks than there are; the sum of both then fits an int.
  p.always_first = std::min(a.always_first, p.num_blocks);
  p.always_last = std::min(a.always_last, p.num_blocks);
  p.seed = a.seed;
  p.kept = data<int32_t>(a.kept);
  p.slots = data<int32_t>(a.slots);
  p.row_offsets = data<int32_t>(a.row_offsets);
  p.cu_seqlens = data<int32_t>(a.cu_seqlens);
  p.rows = data<int32_t>(a.rows);
  p.row_slots = data<int32_t>(a.row_slots);
  p.weights = data<float>(a.weights);
  p.info = data<int32_t>(a.info);

  choose_blocks<<<static_cast<unsigned>(p.num_documents), kThreads, 0, stream>>>(p);
  check_launch("select: choose_blocks");
  if (p.num_documents > 1) {
    pack_blocks<<<1, kThreads, 0, stream>>>(p);
    check_launch("select: pack_blocks");
  }
  const unsigned writers = static_cast<unsigned>(ceil_div(static_cast<int64_t>(p.num_blocks) * 32, 256));
  write_rows<<<writers, 256, 0, stream>>>(p);
  check_launch("select: write_rows");
}

uint64_t select_workspace(const lemo_exec&, const lemo_select_args& a) {
  Problem p{};
  return layout(nullptr, a.scores.shape[0], p);
}

}  // namespace lemo::cuda
