#include "kernels/layer_norm.h"

#include <cmath>

#include "kernels/reference/reference.h"

namespace memserve::kernels::reference {

void LayerNorm(const LayerNormArgs& args) {
  const int64_t num_tokens = args.x.dim(0), dim = args.x.dim(1);
  MEMSERVE_CHECK(args.out.shape == args.x.shape);
  MEMSERVE_CHECK_EQ(args.weight.dim(0), dim);
  if (args.bias) MEMSERVE_CHECK_EQ(args.bias.dim(0), dim);
  for (int64_t t = 0; t < num_tokens; ++t) {
    double mean = 0, var = 0;
    for (int64_t d = 0; d < dim; ++d) mean += double{args.x(t, d)} / dim;
    for (int64_t d = 0; d < dim; ++d) var += (args.x(t, d) - mean) * (args.x(t, d) - mean) / dim;
    const double scale = 1 / std::sqrt(var + args.eps);
    for (int64_t d = 0; d < dim; ++d) {
      args.out(t, d) = (args.x(t, d) - mean) * scale * args.weight(d) + (args.bias ? args.bias(d) : 0.0f);
    }
  }
}

}  // namespace memserve::kernels::reference
