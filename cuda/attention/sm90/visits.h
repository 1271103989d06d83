// What a tile of an sm_90a kernel visits.
#pragma once

namespace lemo::cuda::attention::sm90 {

// The tiles of the other side: out of those that causality allows,
enum class Visits {
  kAll,     // every one
  kListed,  // its own and those of its list
  kWindow,  // those that a sliding window reaches (window_edges.h)
};

}  // namespace lemo::cuda::attention::sm90
