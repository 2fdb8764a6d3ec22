#include "kernels/rope.h"

#include "kernels/reference/reference.h"

namespace memserve::kernels::reference {

void Rope(const RopeArgs& args) {
  const int64_t num_tokens = args.x.dim(0), heads = args.x.dim(1), head_dim = args.x.dim(2);
  const int64_t half_dim = args.cos.dim(1);
  MEMSERVE_CHECK(2 * half_dim <= head_dim);
  MEMSERVE_CHECK(args.sin.shape == args.cos.shape);
  MEMSERVE_CHECK_EQ(args.positions.dim(0), num_tokens);
  const bool interleaved = args.pairing == RopePairing::kInterleaved;
  for (int64_t t = 0; t < num_tokens; ++t) {
    const int64_t p = args.positions(t);
    MEMSERVE_CHECK(0 <= p && p < args.cos.dim(0));
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < half_dim; ++i) {
        float& a = args.x(t, h, interleaved ? 2 * i : i);
        float& b = args.x(t, h, interleaved ? 2 * i + 1 : half_dim + i);
        const double cos = args.cos(p, i), sin = args.sin(p, i);
        const double turned_a = a * cos - b * sin, turned_b = a * sin + b * cos;
        a = turned_a;
        b = turned_b;
      }
    }
  }
}

}  // namespace memserve::kernels::reference
