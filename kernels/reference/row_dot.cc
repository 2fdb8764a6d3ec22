#include "kernels/row_dot.h"

#include <cmath>
#include <numbers>

#include "kernels/reference/reference.h"

namespace memserve::kernels::reference {

void RowDot(const RowDotArgs& args) {
  const ReferenceRowStore& table = Ours(args.table);
  const int64_t num_tokens = args.rows.dim(0), bag = args.rows.dim(1);
  MEMSERVE_CHECK_EQ(args.x.dim(0), num_tokens);
  MEMSERVE_CHECK_EQ(args.x.dim(1), table.spec().dim);
  MEMSERVE_CHECK(args.out.shape == args.rows.shape);
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (int64_t i = 0; i < bag; ++i) {
      const int64_t row = args.rows(t, i);
      MEMSERVE_CHECK(-1 <= row && row < table.spec().rows);
      double sum = 0;
      for (int64_t c = 0; row >= 0 && c < table.spec().columns(); ++c) {
        sum += double{table.At(row, c)} * args.x(t, table.spec().first_column + c);
      }
      args.out(t, i) = row < 0 ? 0 : sum * table.Scale(row);
    }
  }
}

void GeluScale(const GeluScaleArgs& args) {
  MEMSERVE_CHECK(args.weights.shape == args.dots.shape);
  for (int64_t t = 0; t < args.dots.dim(0); ++t) {
    for (int64_t i = 0; i < args.dots.dim(1); ++i) {
      const double x = args.dots(t, i);
      args.weights(t, i) *= 0.5 * x * (1 + std::erf(x / std::numbers::sqrt2));
    }
  }
}

}  // namespace memserve::kernels::reference
