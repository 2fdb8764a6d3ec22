// All that the engine asks of a device: memory, operations, order. Implemented by `reference` (plain loops, sums in double: the
// truth in tests), `cpu` (SIMD and threads) and `cuda`.
//
// A Backend is one device (or one rank's share of the host) with one ordered stream. Operations are enqueued in call order and see
// the results of earlier ones; the host may read results only after Wait(Record()). On the host back ends an operation is done when
// the call returns, and Record/Wait cost nothing. One thread at a time may call a Backend.
//
// Tensors point into memory from Allocate; the engine passes addresses on and never reads through them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/attention.h"
#include "kernels/embedding.h"
#include "kernels/embedding_bag.h"
#include "kernels/found_rows.h"
#include "kernels/gates.h"
#include "kernels/layer_norm.h"
#include "kernels/logit_adjustment.h"
#include "kernels/matmul.h"
#include "kernels/product_key_search.h"
#include "kernels/rms_norm.h"
#include "kernels/rope.h"
#include "kernels/row_dot.h"
#include "kernels/row_store.h"
#include "kernels/sampling.h"
#include "kernels/weight_matrix.h"

namespace memserve::kernels {

// Device memory that frees itself. Opaque to the engine: `address` is passed back to the back end, never read through.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(void* address, int64_t bytes, std::shared_ptr<void> owner)
      : address_(address), bytes_(bytes), owner_(std::move(owner)) {}
  void* address() const { return address_; }
  int64_t bytes() const { return bytes_; }

 private:
  void* address_ = nullptr;
  int64_t bytes_ = 0;
  std::shared_ptr<void> owner_;
};

class Backend {
 public:
  using Event = int64_t;

  virtual ~Backend() = default;
  virtual std::string_view name() const = 0;  // "reference", "cpu", "cuda"
  virtual std::string isa() const = 0;        // the instruction set that runs, e.g. "AVX3_ZEN4"; what the bit-for-bit promise holds for
  virtual int threads() const = 0;

  // --- memory. RESOURCE_EXHAUSTED names purpose and bytes. New memory is zeroed.
  virtual absl::StatusOr<DeviceBuffer> Allocate(int64_t bytes, std::string_view purpose) = 0;
  // These ranges [address, bytes) will be used, from their beginnings on: where a first use is slow, it is done in the background.
  // Once.
  virtual void MakeReady(std::vector<std::pair<void*, int64_t>> ranges) { static_cast<void>(ranges); }
  virtual void CopyToDevice(void* device, const void* host, int64_t bytes) = 0;
  virtual void CopyToHost(void* host, const void* device, int64_t bytes) = 0;
  virtual absl::StatusOr<std::unique_ptr<WeightMatrix>> NewWeightMatrix(const WeightMatrixSpec& spec) = 0;
  virtual absl::StatusOr<std::unique_ptr<RowStore>> NewRowStore(const RowStoreSpec& spec) = 0;

  // --- order
  virtual Event Record() = 0;
  virtual void Wait(Event event) = 0;

  // --- operations; each has its contract in the header of its arguments
  virtual void Embedding(const EmbeddingArgs& args) = 0;
  virtual void RmsNorm(const RmsNormArgs& args) = 0;
  virtual void LayerNorm(const LayerNormArgs& args) = 0;
  virtual void MatMul(const MatMulArgs& args) = 0;
  virtual void Rope(const RopeArgs& args) = 0;
  virtual void KvWrite(const KvWriteArgs& args) = 0;
  virtual void KvCopy(const KvCopyArgs& args) = 0;
  virtual void Attention(const AttentionArgs& args) = 0;
  virtual void SiluProduct(const SiluProductArgs& args) = 0;
  virtual void SigmoidGate(const SigmoidGateArgs& args) = 0;
  virtual void ProductKeySearch(const ProductKeySearchArgs& args) = 0;
  virtual void MaskRows(const MaskRowsArgs& args) = 0;
  virtual void SelectBags(const SelectBagsArgs& args) = 0;
  virtual void CountRows(const CountRowsArgs& args) = 0;
  // Start and Finish of the table in one call.
  virtual void EmbeddingBag(const EmbeddingBagArgs& args) = 0;
  virtual void RowDot(const RowDotArgs& args) = 0;
  virtual void GeluScale(const GeluScaleArgs& args) = 0;
  virtual void SelectRows(const SelectRowsArgs& args) = 0;
  virtual void Sample(const SampleArgs& args) = 0;
  virtual void TokenLogprob(const TokenLogprobArgs& args) = 0;
  virtual void AdjustLogits(const AdjustLogitsArgs& args) = 0;
  virtual void TopLogprobs(const TopLogprobsArgs& args) = 0;
};

struct CpuBackendOptions {
  int threads = 0;          // 0: one per core
  std::string isa = "auto";  // or the name of an instruction set to pin, e.g. "AVX2"; INVALID_ARGUMENT lists those that run here
};

std::unique_ptr<Backend> NewReferenceBackend();
absl::StatusOr<std::unique_ptr<Backend>> NewCpuBackend(const CpuBackendOptions& options);

}  // namespace memserve::kernels
