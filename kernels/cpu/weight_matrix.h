// Weights packed for products whose lanes run over outputs: blocks of four panels of 16 outputs, k ascending within a block, so
// that the product with one row reads one stream.
//
//   f32    [groups][blocks][k][64]
//   bf16   [groups][blocks][⌈k/2⌉][64][2]      two values of k side by side, as the bf16 dot products want them
//
// The last block holds only the panels that it needs. Outputs beyond n and the missing half of the last pair are zero.
#pragma once

#include <algorithm>

#include "absl/status/statusor.h"
#include "kernels/cpu/host_memory.h"
#include "kernels/weight_matrix.h"

namespace memserve::kernels::cpu {

inline constexpr int64_t kPanel = 16;       // outputs
inline constexpr int64_t kBlockPanels = 4;  // panels

class PackedMatrix final : public WeightMatrix {
 public:
  static absl::StatusOr<std::unique_ptr<PackedMatrix>> New(const WeightMatrixSpec& spec);

  void Store(int64_t group, int64_t first_row, int64_t count, const void* rows, DType source, int64_t source_stride) override;
  int64_t bytes() const override { return memory_.bytes(); }

  // Widens one row.
  void ReadRow(int64_t group, int64_t row, float* out) const;

  int64_t panels() const { return (spec().n + kPanel - 1) / kPanel; }
  int64_t panel_values() const { return PanelValues(spec()); }
  // Panels in the block that begins with panel `first`, a multiple of kBlockPanels.
  int64_t BlockPanels(int64_t first) const { return std::min(kBlockPanels, panels() - first); }
  template <typename T>
  const T* Block(int64_t group, int64_t first) const {
    return memory_.as<T>() + (group * panels() + first) * panel_values();
  }

  static int64_t PanelValues(const WeightMatrixSpec& spec) {
    return (spec.dtype == DType::kBF16 ? (spec.k + 1) / 2 * 2 : spec.k) * kPanel;
  }

 private:
  PackedMatrix(const WeightMatrixSpec& spec, HostMemory memory) : WeightMatrix(spec), memory_(std::move(memory)) {}

  // Where in a block of `width` outputs value k of output `lane` lies.
  int64_t Place(int64_t k, int64_t width, int64_t lane) const {
    return spec().dtype == DType::kBF16 ? (k / 2 * width + lane) * 2 + k % 2 : k * width + lane;
  }
  template <typename To, typename From>
  void StoreRows(int64_t group, int64_t first_row, int64_t count, const From* rows, int64_t source_stride);

  const HostMemory memory_;
};

}  // namespace memserve::kernels::cpu
