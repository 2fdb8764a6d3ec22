#include "kernels/embedding_bag.h"

#include <algorithm>
#include <cmath>

#include "kernels/reference/reference.h"

namespace memserve::kernels::reference {
namespace {

const RowOverlay* OverlayOf(const EmbeddingBagArgs& args, int64_t b) {
  if (!args.overlay_of_bag || args.overlay_of_bag(b) < 0) return nullptr;
  return args.overlays[args.overlay_of_bag(b)];
}

// sum + weight · column c of a row, from the overlay where that lists the row.
float AddTerm(const ReferenceRowStore& table, const RowOverlay* overlay, int64_t row, float weight, int64_t c, float sum) {
  if (overlay != nullptr) {
    const auto found = std::lower_bound(overlay->rows.begin(), overlay->rows.end(), row);
    if (found != overlay->rows.end() && *found == row) {
      return std::fma(weight, overlay->values[(found - overlay->rows.begin()) * table.spec().columns() + c], sum);
    }
  }
  if (HasScales(table.spec().format)) weight *= table.Scale(row);
  return std::fma(weight, table.At(row, c), sum);
}

}  // namespace

void EmbeddingBag(const EmbeddingBagArgs& args) {
  const ReferenceRowStore& table = Ours(args.table);
  const int64_t num_bags = args.rows.dim(0), bag = args.rows.dim(1), columns = table.spec().columns();
  MEMSERVE_CHECK(args.weights.shape == args.rows.shape);
  MEMSERVE_CHECK_EQ(args.out.dim(0), num_bags);
  MEMSERVE_CHECK_EQ(args.out.dim(1), columns);
  if (args.overlay_of_bag) MEMSERVE_CHECK_EQ(args.overlay_of_bag.dim(0), num_bags);
  for (int64_t b = 0; b < num_bags; ++b) {
    const RowOverlay* overlay = OverlayOf(args, b);
    for (int64_t c = 0; c < columns; ++c) {
      // Not a double: the contract asks for these very bits of every back end.
      float sum = 0;
      for (int64_t i = 0; i < bag; ++i) {
        const int64_t row = args.rows(b, i);
        MEMSERVE_CHECK(-1 <= row && row < table.spec().rows);
        if (row >= 0) sum = AddTerm(table, overlay, row, args.weights(b, i), c, sum);
      }
      args.out(b, c) = sum;
    }
  }
}

}  // namespace memserve::kernels::reference
