#include "kernels/gates.h"

#include <cmath>

#include "kernels/reference/reference.h"

namespace memserve::kernels::reference {

void SiluProduct(const SiluProductArgs& args) {
  MEMSERVE_CHECK(args.a.shape == args.b.shape);
  MEMSERVE_CHECK(args.out.shape == args.a.shape);
  for (int64_t t = 0; t < args.a.dim(0); ++t) {
    for (int64_t i = 0; i < args.a.dim(1); ++i) {
      const double a = args.a(t, i);
      args.out(t, i) = a / (1 + std::exp(-a)) * args.b(t, i);
    }
  }
}

void SigmoidGate(const SigmoidGateArgs& args) {
  MEMSERVE_CHECK_EQ(args.gate.dim(0), args.x.dim(0));
  MEMSERVE_CHECK_EQ(args.gate.dim(1), 1);
  for (int64_t t = 0; t < args.x.dim(0); ++t) {
    const double sigmoid = 1 / (1 + std::exp(-double{args.gate(t, 0)}));
    for (int64_t i = 0; i < args.x.dim(1); ++i) args.x(t, i) *= sigmoid;
  }
}

}  // namespace memserve::kernels::reference
