// Which kernel serves a head_dim.
#pragma once

namespace lemo::cuda::sm90 {

// The head_dim of the kernel that serves tensors of `head_dim`: 80, which TMA boxes of 32 columns do not divide
// (kBoxColumns), runs as 96, whose last 16 columns TMA fills with zeros.
constexpr int padded_head_dim(int head_dim) { return head_dim == 80 ? 96 : head_dim; }

// Whether tensors of the kernel may have fewer columns than the kernel.
template <int kHeadDim>
constexpr bool kMayBePadded = kHeadDim == padded_head_dim(80);

}  // namespace lemo::cuda::sm90
