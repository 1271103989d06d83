// Constants of softmax in base 2.
#pragma once

namespace lemo::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

}  // namespace lemo::cuda
