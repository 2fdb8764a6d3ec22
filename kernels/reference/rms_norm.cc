#include "kernels/rms_norm.h"

#include <cmath>

#include "kernels/reference/reference.h"

namespace memserve::kernels::reference {

void RmsNorm(const RmsNormArgs& args) {
  const int64_t num_tokens = args.x.dim(0), dim = args.x.dim(1);
  if (args.delta) MEMSERVE_CHECK(args.delta.shape == args.x.shape);
  if (args.delta_on) MEMSERVE_CHECK_EQ(args.delta_on.dim(0), num_tokens);
  if (args.out) {
    MEMSERVE_CHECK(args.out.shape == args.x.shape);
    MEMSERVE_CHECK_EQ(args.weight.dim(0), dim);
  }
  for (int64_t t = 0; t < num_tokens; ++t) {
    if (args.delta && (!args.delta_on || args.delta_on(t) != 0)) {
      for (int64_t d = 0; d < dim; ++d) args.x(t, d) += args.delta(t, d);
    }
    if (!args.out) continue;
    double sum = 0;
    for (int64_t d = 0; d < dim; ++d) sum += double{args.x(t, d)} * args.x(t, d);
    const double scale = 1 / std::sqrt(sum / dim + args.eps);
    for (int64_t d = 0; d < dim; ++d) args.out(t, d) = args.x(t, d) * scale * args.weight(d);
  }
}

}  // namespace memserve::kernels::reference
