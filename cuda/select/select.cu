// Choosing blocks on the device, in four launches and no host synchronisation:
//   rank_blocks     a sortable 64-bit rank of every block (small = taken first); faults
//   choose_blocks   one CTA per document: radix select of the k-th rank, ties to the lower block
//   pack_blocks     one CTA: prefix sums over the kept blocks -> slots, offsets, counts
//   write_rows      one warp per block: its tokens -> rows, row_slots
#include <algorithm>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "cuda/common/check.h"
#include "cuda/kernels.h"
#include "src/hash.h"

namespace lemo::cuda {
namespace {

constexpr int kThreads = 512;
constexpr float kCertain = 0.999f;  // from this probability on a block is always drawn and weighs 1
constexpr int kNoneByte = 0x7f;
constexpr int32_t kNone = 0x7f7f7f7f;  // above any block number, and a byte-wise memset can write it

struct Problem {
  const float* scores;
  const int32_t* offsets;
  const int32_t* documents;
  int num_blocks, num_documents, num_tokens;
  int mode;
  float keep, threshold;
  int always_first, always_last;
  uint64_t seed;

  uint64_t* ranks;     // [num_blocks]
  int32_t* flags;      // [num_blocks]: 1 = kept
  int32_t* packed;     // [num_blocks + 1]: kept tokens before the block
  int32_t* bad_block;  // [1]: the first block with an invalid score, kNone if none

  int32_t *kept, *slots, *row_offsets, *cu_seqlens, *rows, *row_slots, *info;
  float* weights;
};

// Maps doubles to integers of the same order.
__device__ uint64_t sortable(double x) {
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(x + 0.0));  // -0 and 0 are a tie
  return bits >> 63 ? ~bits : bits | (uint64_t{1} << 63);
}

__device__ int document_of(const Problem& p, int block) {
  int low = 0, high = p.num_documents;  // documents[low] <= block < documents[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (p.documents[middle] <= block ? low : high) = middle;
  }
  return low;
}

__device__ bool forced(const Problem& p, int block, int document) {
  return block - p.documents[document] < p.always_first || p.documents[document + 1] - block <= p.always_last;
}

__global__ void rank_blocks(Problem p) {
  const int block = blockIdx.x * blockDim.x + threadIdx.x;
  if (block >= p.num_blocks) return;
  const float score = p.scores[block];
  const bool sample = p.mode == LEMO_SELECT_SAMPLE;
  if (!isfinite(score) || (sample && !(score > 0.0f && score <= 1.0f))) atomicMin(p.bad_block, block);
  const bool always = forced(p, block, document_of(p, block));
  if (p.mode == LEMO_SELECT_THRESHOLD) {
    p.flags[block] = always || score >= p.threshold;
    return;
  }
  double rank = -static_cast<double>(score);
  if (sample && score >= kCertain) {
    rank = -1.0;
  } else if (sample) {
    const double u = hash_uniform(p.seed, static_cast<uint64_t>(block)), q = score;
    rank = (u / (1.0 - u)) / (q / (1.0 - q));
  }
  p.ranks[block] = always ? 0 : sortable(rank);
}

__global__ void __launch_bounds__(kThreads) choose_blocks(Problem p) {
  const int first = p.documents[blockIdx.x], last = p.documents[blockIdx.x + 1], n = last - first;
  const int forced_blocks = min(n, p.always_first + p.always_last);
  const int wanted = static_cast<int>(floor(static_cast<double>(p.keep) * n + 0.5));
  const int k = min(n, max(max(wanted, forced_blocks), 1));

  // The k-th smallest rank, one byte at a time from the top: `remaining` blocks are still to be found among those that
  // share the bytes fixed so far.
  __shared__ int histogram[256];
  __shared__ int chosen_byte, remaining_after;
  uint64_t prefix = 0;
  int remaining = k;
  for (int shift = 56; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += kThreads) histogram[i] = 0;
    __syncthreads();
    for (int block = first + threadIdx.x; block < last; block += kThreads) {
      const uint64_t rank = p.ranks[block];
      const bool shares = shift == 56 || (rank >> (shift + 8)) == (prefix >> (shift + 8));
      if (shares) atomicAdd(&histogram[(rank >> shift) & 255], 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int byte = 0, left = remaining;
      while (left > histogram[byte]) left -= histogram[byte++];
      chosen_byte = byte;
      remaining_after = left;
    }
    __syncthreads();
    prefix |= static_cast<uint64_t>(chosen_byte) << shift;
    remaining = remaining_after;
    __syncthreads();
  }

  // Every block below the k-th rank, and the first `remaining` of those that tie with it.
  using Scan = cub::BlockScan<int, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  int ties_before = 0;
  for (int base = first; base < last; base += kThreads) {
    const int block = base + static_cast<int>(threadIdx.x);
    const uint64_t rank = block < last ? p.ranks[block] : ~uint64_t{0};
    const int tie = block < last && rank == prefix;
    int before, total;
    Scan(storage).ExclusiveSum(tie, before, total);
    if (block < last) p.flags[block] = rank < prefix || (tie && ties_before + before < remaining);
    ties_before += total;
    __syncthreads();
  }
}

struct Count {
  int blocks, tokens;
};
struct AddCounts {
  __device__ Count operator()(Count a, Count b) const { return {a.blocks + b.blocks, a.tokens + b.tokens}; }
};

__global__ void __launch_bounds__(kThreads) pack_blocks(Problem p) {
  using Scan = cub::BlockScan<Count, kThreads>;
  using Reduce = cub::BlockReduce<int, kThreads>;
  __shared__ union {
    typename Scan::TempStorage scan;
    typename Reduce::TempStorage reduce;
  } storage;
  const bool bad = *p.bad_block != kNone;
  Count done{0, 0};
  for (int base = 0; base < p.num_blocks; base += kThreads) {
    const int block = base + static_cast<int>(threadIdx.x);
    const bool kept = !bad && block < p.num_blocks && p.flags[block] != 0;
    const Count own{kept, kept ? p.offsets[block + 1] - p.offsets[block] : 0};
    Count before, total;
    Scan(storage.scan).ExclusiveScan(own, before, Count{0, 0}, AddCounts{}, total);
    const int slot = done.blocks + before.blocks;
    if (block < p.num_blocks) {
      p.packed[block] = done.tokens + before.tokens;
      p.slots[block] = kept ? slot : -1;
    }
    if (kept) {
      const float score = p.scores[block];
      const bool weighted =
          p.mode == LEMO_SELECT_SAMPLE && score < kCertain && !forced(p, block, document_of(p, block));
      p.kept[slot] = block;
      p.row_offsets[slot] = done.tokens + before.tokens;
      p.weights[slot] = weighted ? 1.0f / score : 1.0f;
    }
    done = AddCounts{}(done, total);
    __syncthreads();
  }
  for (int i = done.blocks + static_cast<int>(threadIdx.x); i <= p.num_blocks; i += kThreads) {
    p.row_offsets[i] = done.tokens;
    if (i == p.num_blocks) break;
    p.kept[i] = -1;
    p.weights[i] = 0.0f;
  }
  if (threadIdx.x == 0) p.packed[p.num_blocks] = done.tokens;
  __syncthreads();  // makes this CTA's writes to `packed` visible to all its threads
  int longest = 0;
  for (int d = threadIdx.x; d <= p.num_documents; d += kThreads) {
    const int start = p.packed[p.documents[d]];
    p.cu_seqlens[d] = start;
    if (d < p.num_documents) longest = max(longest, p.packed[p.documents[d + 1]] - start);
  }
  struct Max {
    __device__ int operator()(int a, int b) const { return a > b ? a : b; }
  };
  longest = Reduce(storage.reduce).Reduce(longest, Max{});
  if (threadIdx.x == 0) {
    p.info[0] = done.blocks;
    p.info[1] = done.tokens;
    p.info[2] = longest;
    p.info[3] = bad ? *p.bad_block + 1 : done.blocks == 0 ? -1 : 0;
  }
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
  for (int i = p.info[1] + thread; i < p.num_tokens; i += threads) p.rows[i] = p.row_slots[i] = -1;
}

uint64_t layout(void* workspace, int64_t num_blocks, Problem& p) {
  Arena arena(workspace);
  p.ranks = arena.take<uint64_t>(num_blocks);
  p.flags = arena.take<int32_t>(num_blocks);
  p.packed = arena.take<int32_t>(num_blocks + 1);
  p.bad_block = arena.take<int32_t>(1);
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

  check(cudaMemsetAsync(p.bad_block, kNoneByte, sizeof(int32_t), stream), "select: cudaMemsetAsync");
  rank_blocks<<<static_cast<unsigned>(ceil_div(p.num_blocks, 256)), 256, 0, stream>>>(p);
  check_launch("select: rank_blocks");
  if (p.mode != LEMO_SELECT_THRESHOLD) {
    choose_blocks<<<static_cast<unsigned>(p.num_documents), kThreads, 0, stream>>>(p);
    check_launch("select: choose_blocks");
  }
  pack_blocks<<<1, kThreads, 0, stream>>>(p);
  check_launch("select: pack_blocks");
  const unsigned writers = static_cast<unsigned>(ceil_div(static_cast<int64_t>(p.num_blocks) * 32, 256));
  write_rows<<<writers, 256, 0, stream>>>(p);
  check_launch("select: write_rows");
}

uint64_t select_workspace(const lemo_exec&, const lemo_select_args& a) {
  Problem p{};
  return layout(nullptr, a.scores.shape[0], p);
}

}  // namespace lemo::cuda
