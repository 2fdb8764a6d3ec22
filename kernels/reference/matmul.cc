#include "kernels/matmul.h"

#include "kernels/reference/reference.h"

namespace memserve::kernels::reference {

void MatMul(const MatMulArgs& args) {
  const ReferenceWeightMatrix& weight = Ours(args.weight);
  const WeightMatrixSpec& spec = weight.spec();
  const int64_t num_rows = args.x.dim(0);
  MEMSERVE_CHECK_EQ(spec.groups, 1);
  MEMSERVE_CHECK_EQ(args.x.dim(1), spec.k);
  MEMSERVE_CHECK_EQ(args.out.dim(0), num_rows);
  MEMSERVE_CHECK_EQ(args.out.dim(1), spec.n);
  if (args.bias) MEMSERVE_CHECK_EQ(args.bias.dim(0), spec.n);
  for (int64_t m = 0; m < num_rows; ++m) {
    for (int64_t n = 0; n < spec.n; ++n) {
      double sum = 0;
      for (int64_t k = 0; k < spec.k; ++k)
        sum += double{RoundTo(spec.activation, args.x(m, k))} * weight.At(0, n, k);
      args.out(m, n) = args.bias ? sum + args.bias(n) : sum;
    }
  }
}

}  // namespace memserve::kernels::reference
