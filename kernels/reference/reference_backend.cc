#include <cstring>

#include "kernels/backend.h"
#include "kernels/reference/reference.h"

namespace memserve::kernels {
namespace {

class ReferenceBackend final : public Backend {
 public:
  std::string_view name() const override { return "reference"; }
  std::string isa() const override { return "plain loops"; }
  int threads() const override { return 1; }

  absl::StatusOr<DeviceBuffer> Allocate(int64_t bytes, std::string_view purpose) override {
    return reference::AllocateHost(bytes, purpose);
  }
  void CopyToDevice(void* device, const void* host, int64_t bytes) override { Copy(device, host, bytes); }
  void CopyToHost(void* host, const void* device, int64_t bytes) override { Copy(host, device, bytes); }
  absl::StatusOr<std::unique_ptr<WeightMatrix>> NewWeightMatrix(const WeightMatrixSpec& spec) override {
    return reference::NewWeightMatrix(spec);
  }
  absl::StatusOr<std::unique_ptr<RowStore>> NewRowStore(const RowStoreSpec& spec) override {
    return reference::NewRowStore(spec);
  }

  Event Record() override { return 0; }
  void Wait(Event event) override {}

  void Embedding(const EmbeddingArgs& args) override { reference::Embedding(args); }
  void RmsNorm(const RmsNormArgs& args) override { reference::RmsNorm(args); }
  void LayerNorm(const LayerNormArgs& args) override { reference::LayerNorm(args); }
  void MatMul(const MatMulArgs& args) override { reference::MatMul(args); }
  void Rope(const RopeArgs& args) override { reference::Rope(args); }
  void KvWrite(const KvWriteArgs& args) override { reference::KvWrite(args); }
  void KvCopy(const KvCopyArgs& args) override { reference::KvCopy(args); }
  void Attention(const AttentionArgs& args) override { reference::Attention(args); }
  void SiluProduct(const SiluProductArgs& args) override { reference::SiluProduct(args); }
  void SigmoidGate(const SigmoidGateArgs& args) override { reference::SigmoidGate(args); }
  void ProductKeySearch(const ProductKeySearchArgs& args) override { reference::ProductKeySearch(args); }
  void MaskRows(const MaskRowsArgs& args) override { reference::MaskRows(args); }
  void SelectBags(const SelectBagsArgs& args) override { reference::SelectBags(args); }
  void CountRows(const CountRowsArgs& args) override { reference::CountRows(args); }
  void EmbeddingBag(const EmbeddingBagArgs& args) override {
    const RowStore::Ticket ticket = args.table->Start(args);
    MEMSERVE_CHECK(args.table->Finish(ticket).ok());
  }
  void RowDot(const RowDotArgs& args) override { reference::RowDot(args); }
  void GeluScale(const GeluScaleArgs& args) override { reference::GeluScale(args); }
  void SelectRows(const SelectRowsArgs& args) override { reference::SelectRows(args); }
  void Sample(const SampleArgs& args) override { reference::Sample(args); }
  void TokenLogprob(const TokenLogprobArgs& args) override { reference::TokenLogprob(args); }
  void AdjustLogits(const AdjustLogitsArgs& args) override { reference::AdjustLogits(args); }
  void TopLogprobs(const TopLogprobsArgs& args) override { reference::TopLogprobs(args); }

 private:
  static void Copy(void* to, const void* from, int64_t bytes) {
    if (bytes > 0) std::memcpy(to, from, bytes);
  }
};

}  // namespace

std::unique_ptr<Backend> NewReferenceBackend() { return std::make_unique<ReferenceBackend>(); }

}  // namespace memserve::kernels
