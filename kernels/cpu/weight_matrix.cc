#include "kernels/cpu/weight_matrix.h"

#include <limits>

namespace memserve::kernels {

int64_t PlannedBytes(const WeightMatrixSpec& spec) {
  const __int128 panels = (spec.n + cpu::kPanel - 1) / cpu::kPanel;
  const __int128 bytes = panels * spec.groups * cpu::PackedMatrix::PanelValues(spec) * SizeOf(spec.dtype);
  return static_cast<int64_t>(std::min<__int128>(bytes, std::numeric_limits<int64_t>::max()));
}

namespace cpu {
namespace {

void Convert(float from, float& to) { to = from; }
void Convert(float from, BFloat16& to) { to = ToBFloat16(from); }
void Convert(BFloat16 from, float& to) { to = ToFloat(from); }
void Convert(BFloat16 from, BFloat16& to) { to = from; }

}  // namespace

absl::StatusOr<std::unique_ptr<PackedMatrix>> PackedMatrix::New(const WeightMatrixSpec& spec) {
  MEMSERVE_CHECK(spec.dtype == DType::kF32 || spec.dtype == DType::kBF16);
  MEMSERVE_CHECK(spec.activation == DType::kF32 || spec.activation == spec.dtype);
  MEMSERVE_CHECK(spec.groups >= 0 && spec.n >= 0 && spec.k >= 0);
  absl::StatusOr<HostMemory> memory = HostMemory::Allocate(PlannedBytes(spec), "weights");
  if (!memory.ok()) return memory.status();
  return std::unique_ptr<PackedMatrix>(new PackedMatrix(spec, *std::move(memory)));
}

void PackedMatrix::Store(int64_t group, int64_t first_row, int64_t count, const void* rows, DType source, int64_t source_stride) {
  MEMSERVE_CHECK(group >= 0 && group < spec().groups);
  MEMSERVE_CHECK(first_row >= 0 && count >= 0 && first_row + count <= spec().n);
  MEMSERVE_CHECK(source == DType::kF32 || source == DType::kBF16);
  MEMSERVE_CHECK(source_stride >= spec().k);
  const auto* f32 = static_cast<const float*>(rows);
  const auto* bf16 = static_cast<const BFloat16*>(rows);
  const bool from_f32 = source == DType::kF32;
  if (spec().dtype == DType::kF32) {
    from_f32 ? StoreRows<float>(group, first_row, count, f32, source_stride)
             : StoreRows<float>(group, first_row, count, bf16, source_stride);
  } else {
    from_f32 ? StoreRows<BFloat16>(group, first_row, count, f32, source_stride)
             : StoreRows<BFloat16>(group, first_row, count, bf16, source_stride);
  }
}

template <typename To, typename From>
void PackedMatrix::StoreRows(int64_t group, int64_t first_row, int64_t count, const From* rows, int64_t source_stride) {
  // In runs of k short enough that a panel's cache lines stay near while its 16 rows pass.
  constexpr int64_t kRun = 256, kBlockRows = kBlockPanels * kPanel;
  for (int64_t i = 0; i < count;) {
    const int64_t row = first_row + i, lane = row % kBlockRows;
    const int64_t together = std::min(kPanel - lane % kPanel, count - i);
    const int64_t first = row / kBlockRows * kBlockPanels, width = BlockPanels(first) * kPanel;
    To* block = const_cast<To*>(Block<To>(group, first));
    for (int64_t k0 = 0; k0 < spec().k; k0 += kRun) {
      const int64_t k1 = std::min(spec().k, k0 + kRun);
      for (int64_t r = 0; r < together; ++r) {
        const From* from = rows + (i + r) * source_stride;
        for (int64_t k = k0; k < k1; ++k) Convert(from[k], block[Place(k, width, lane + r)]);
      }
    }
    i += together;
  }
}

void PackedMatrix::ReadRow(int64_t group, int64_t row, float* out) const {
  constexpr int64_t kBlockRows = kBlockPanels * kPanel;
  const int64_t lane = row % kBlockRows, first = row / kBlockRows * kBlockPanels, width = BlockPanels(first) * kPanel;
  const auto read = [&](const auto* block) {
    for (int64_t k = 0; k < spec().k; ++k) out[k] = ToFloat(block[Place(k, width, lane)]);
  };
  spec().dtype == DType::kF32 ? read(Block<float>(group, first)) : read(Block<BFloat16>(group, first));
}

}  // namespace cpu
}  // namespace memserve::kernels
