#include "kernels/embedding.h"

#include "kernels/reference/reference.h"

namespace memserve::kernels::reference {

void Embedding(const EmbeddingArgs& args) {
  const ReferenceWeightMatrix& weight = Ours(args.weight);
  const int64_t num_tokens = args.token_ids.dim(0);
  const int64_t dim = weight.spec().k;
  MEMSERVE_CHECK_EQ(weight.spec().groups, 1);
  MEMSERVE_CHECK_EQ(args.from_slot.dim(0), num_tokens);
  MEMSERVE_CHECK_EQ(args.out.dim(0), num_tokens);
  MEMSERVE_CHECK_EQ(args.out.dim(1), dim);
  for (int64_t t = 0; t < num_tokens; ++t) {
    const int32_t slot = args.from_slot(t);
    MEMSERVE_CHECK(slot < args.sampled.dim(0));
    const int64_t token = slot >= 0 ? args.sampled(slot) : args.token_ids(t);
    MEMSERVE_CHECK(0 <= token && token < weight.spec().n);
    for (int64_t d = 0; d < dim; ++d) args.out(t, d) = weight.At(0, token, d);
  }
}

}  // namespace memserve::kernels::reference
