// The truth in tests: every operation of backend.h as plain loops named like the maths, sums in double.
#pragma once

#include <cstdint>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "absl/status/statusor.h"

#include "kernels/backend.h"

namespace memserve::kernels::reference {

// Zeroed host memory.
absl::StatusOr<DeviceBuffer> AllocateHost(int64_t bytes, std::string_view purpose);

// A flat array of f32 or bf16, read and written as float32.
struct StoredValues {
  void* data = nullptr;
  DType dtype = DType::kF32;

  float Get(int64_t i) const {
    return dtype == DType::kBF16 ? ToFloat(static_cast<const BFloat16*>(data)[i])
                                 : static_cast<const float*>(data)[i];
  }
  void Set(int64_t i, float value) const {
    if (dtype == DType::kBF16) {
      static_cast<BFloat16*>(data)[i] = ToBFloat16(value);
    } else {
      static_cast<float*>(data)[i] = value;
    }
  }
};

// What an activation becomes before it meets a weight.
inline float RoundTo(DType activation, float x) {
  return activation == DType::kBF16 ? ToFloat(ToBFloat16(x)) : x;
}

// Row-major: [groups, n, k].
class ReferenceWeightMatrix final : public WeightMatrix {
 public:
  ReferenceWeightMatrix(const WeightMatrixSpec& spec, DeviceBuffer memory)
      : WeightMatrix(spec), memory_(memory) {}
  void Store(int64_t group, int64_t first_row, int64_t count, const void* rows, DType source,
             int64_t source_stride) override;
  int64_t bytes() const override { return memory_.bytes(); }

  float At(int64_t group, int64_t n, int64_t k) const {
    return StoredValues{memory_.address(), spec().dtype}.Get((group * spec().n + n) * spec().k + k);
  }

 private:
  DeviceBuffer memory_;
};

// Row-major: [rows, columns of the store].
class ReferenceRowStore final : public RowStore {
 public:
  ReferenceRowStore(const RowStoreSpec& spec, DeviceBuffer memory)
      : RowStore(spec), memory_(memory), scales_(HasScales(spec.format) ? spec.rows : 0) {}
  using RowStore::Store;
  void* DirectRows() override;
  float* DirectScales() override { return HasScales(spec().format) ? scales_.data() : nullptr; }
  void Store(int64_t first_row, int64_t count, const void* rows, DType source, const float* scales) override;
  Ticket Start(const EmbeddingBagArgs& args) override;
  absl::Status Finish(Ticket ticket) override;
  int64_t bytes() const override { return memory_.bytes() + static_cast<int64_t>(scales_.size() * sizeof(float)); }
  const char* placement() const override { return "host"; }

  // Column c of this store, column spec().first_column + c of the table, still to be multiplied by the row's scale.
  float At(int64_t row, int64_t c) const {
    const char* rows = static_cast<const char*>(memory_.address());
    return CodeAt(rows + row * RowBytes(spec().format, spec().columns()), spec().format, c);
  }
  float Scale(int64_t row) const { return scales_.empty() ? 1.0f : scales_[row]; }

 private:
  DeviceBuffer memory_;
  std::vector<float> scales_;
  Ticket next_ticket_ = 0;
  std::unordered_map<Ticket, EmbeddingBagArgs> started_;
};

absl::StatusOr<std::unique_ptr<WeightMatrix>> NewWeightMatrix(const WeightMatrixSpec& spec);
absl::StatusOr<std::unique_ptr<RowStore>> NewRowStore(const RowStoreSpec& spec);
const ReferenceWeightMatrix& Ours(const WeightMatrix* weight);
const ReferenceRowStore& Ours(const RowStore* table);

void Embedding(const EmbeddingArgs& args);
void RmsNorm(const RmsNormArgs& args);
void LayerNorm(const LayerNormArgs& args);
void MatMul(const MatMulArgs& args);
void Rope(const RopeArgs& args);
void KvWrite(const KvWriteArgs& args);
void KvCopy(const KvCopyArgs& args);
void Attention(const AttentionArgs& args);
void SiluProduct(const SiluProductArgs& args);
void SigmoidGate(const SigmoidGateArgs& args);
void ProductKeySearch(const ProductKeySearchArgs& args);
void MaskRows(const MaskRowsArgs& args);
void SelectBags(const SelectBagsArgs& args);
void CountRows(const CountRowsArgs& args);
void EmbeddingBag(const EmbeddingBagArgs& args);
void RowDot(const RowDotArgs& args);
void GeluScale(const GeluScaleArgs& args);
void SelectRows(const SelectRowsArgs& args);
void Sample(const SampleArgs& args);
void TokenLogprob(const TokenLogprobArgs& args);
void AdjustLogits(const AdjustLogitsArgs& args);
void TopLogprobs(const TopLogprobsArgs& args);

}  // namespace memserve::kernels::reference
