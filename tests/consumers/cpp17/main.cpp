// Causal attention over two rows through the C++ header, checked against the closed form, and an exception.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <lemo/lemo.hpp>
#include <vector>

int main() {
  constexpr int64_t kRows = 2;
  constexpr int64_t kDim = 4;
  const std::vector<float> q = {1, 0, 0, 0, 0, 1, 0, 0};
  const std::vector<float> k = {0, 2, 0, 0, 0, 1, 0, 0};
  const std::vector<float> v = {1, 2, 3, 4, 5, 6, 7, 8};
  const std::vector<int32_t> cu_seqlens = {0, kRows};
  std::vector<float> out(kRows * kDim);
  std::vector<float> lse(kRows);

  auto args = lemo::make<lemo_attention_forward_args>();
  args.q = lemo::view(q.data(), {kRows, 1, kDim});
  args.k = lemo::view(k.data(), {kRows, 1, kDim});
  args.v = lemo::view(v.data(), {kRows, 1, kDim});
  args.cu_seqlens = lemo::view(cu_seqlens.data(), {2});
  args.max_seqlen = kRows;
  args.scale = 1.0f;
  args.out = lemo::view(out.data(), {kRows, 1, kDim});
  args.lse = lemo::view(lse.data(), {1, kRows});
  lemo::run(lemo::cpu(1), args);

  // Row 0 sees itself; row 1 sees scores 2 and 1.
  const double p = 1.0 / (1.0 + std::exp(-1.0));
  for (int64_t c = 0; c < kDim; ++c) {
    const double expected = p * v[static_cast<size_t>(c)] + (1 - p) * v[static_cast<size_t>(kDim + c)];
    if (out[static_cast<size_t>(c)] != v[static_cast<size_t>(c)] ||
        std::abs(out[static_cast<size_t>(kDim + c)] - expected) > 1e-5) {
      std::fprintf(stderr, "column %d: got %g\n", static_cast<int>(c), out[static_cast<size_t>(kDim + c)]);
      return 1;
    }
  }

  args.k = lemo::view(k.data(), {1, 2, kDim});
  try {
    lemo::run(lemo::cpu(), args);
    std::fprintf(stderr, "a wrong shape was accepted\n");
    return 1;
  } catch (const lemo::Exception& error) {
    if (error.status() != LEMO_INVALID_ARGUMENT || std::strstr(error.what(), "k: expected shape") == nullptr) {
      std::fprintf(stderr, "unexpected message: %s\n", error.what());
      return 1;
    }
  }
  std::printf("lemo %s ok\n", lemo_version());
  return 0;
}
