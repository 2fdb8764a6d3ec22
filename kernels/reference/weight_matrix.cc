#include "kernels/weight_matrix.h"

#include "kernels/reference/reference.h"

namespace memserve::kernels::reference {

void ReferenceWeightMatrix::Store(int64_t group, int64_t first_row, int64_t count, const void* rows,
                                  DType source, int64_t source_stride) {
  MEMSERVE_CHECK(0 <= group && group < spec().groups);
  MEMSERVE_CHECK(0 <= first_row && 0 <= count && first_row + count <= spec().n);
  MEMSERVE_CHECK(source == DType::kF32 || source == DType::kBF16);
  const StoredValues from{const_cast<void*>(rows), source};
  const StoredValues to{memory_.address(), spec().dtype};
  for (int64_t n = 0; n < count; ++n) {
    for (int64_t k = 0; k < spec().k; ++k) {
      to.Set((group * spec().n + first_row + n) * spec().k + k, from.Get(n * source_stride + k));
    }
  }
}

absl::StatusOr<std::unique_ptr<WeightMatrix>> NewWeightMatrix(const WeightMatrixSpec& spec) {
  MEMSERVE_CHECK(spec.groups >= 0 && spec.n >= 0 && spec.k >= 0);
  MEMSERVE_CHECK(spec.dtype == DType::kF32 || spec.dtype == DType::kBF16);
  MEMSERVE_CHECK(spec.activation == DType::kF32 ||
                 (spec.activation == DType::kBF16 && spec.dtype == DType::kBF16));
  auto memory = AllocateHost(spec.groups * spec.n * spec.k * SizeOf(spec.dtype), "weight matrix");
  if (!memory.ok()) return memory.status();
  return std::make_unique<ReferenceWeightMatrix>(spec, *std::move(memory));
}

const ReferenceWeightMatrix& Ours(const WeightMatrix* weight) {
  const auto* ours = dynamic_cast<const ReferenceWeightMatrix*>(weight);
  MEMSERVE_CHECK(ours != nullptr);
  return *ours;
}

}  // namespace memserve::kernels::reference
