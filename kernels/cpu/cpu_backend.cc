#include <sched.h>

#include <cmath>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/backend.h"
#include "kernels/cpu/functions.h"
#include "kernels/cpu/host_memory.h"
#include "kernels/cpu/prefault.h"
#include "kernels/cpu/row_store.h"
#include "kernels/cpu/targets.h"
#include "kernels/cpu/weight_matrix.h"

namespace memserve::kernels {
namespace cpu {
namespace {

const PackedMatrix& Ours(const WeightMatrix* weight) {
  const auto* ours = dynamic_cast<const PackedMatrix*>(weight);
  MEMSERVE_CHECK(ours != nullptr);
  return *ours;
}

const HostRowStore& Ours(const RowStore* table) {
  const auto* ours = dynamic_cast<const HostRowStore*>(table);
  MEMSERVE_CHECK(ours != nullptr);
  return *ours;
}

class CpuBackend final : public Backend {
 public:
  CpuBackend(int threads, int64_t target) : context_(threads), isa_(hwy::TargetName(target)) {
    const size_t index = TableIndex(target);
    AddElementwise(index, functions_);
    AddMatMul(index, functions_);
    AddAttention(index, functions_);
    AddProductKeySearch(index, functions_);
    AddEmbeddingBag(index, functions_);
    AddSampling(index, functions_);
  }

  std::string_view name() const override { return "cpu"; }
  std::string isa() const override { return isa_; }
  int threads() const override { return context_.pool.size(); }

  absl::StatusOr<DeviceBuffer> Allocate(int64_t bytes, std::string_view purpose) override {
    absl::StatusOr<HostMemory> memory = HostMemory::Allocate(bytes, purpose);
    if (!memory.ok()) return memory.status();
    return DeviceBuffer(memory->as<void>(), bytes, memory->owner());
  }
  void CopyToDevice(void* device, const void* host, int64_t bytes) override { Copy(device, host, bytes); }
  void CopyToHost(void* host, const void* device, int64_t bytes) override { Copy(host, device, bytes); }
  absl::StatusOr<std::unique_ptr<WeightMatrix>> NewWeightMatrix(const WeightMatrixSpec& spec) override {
    return PackedMatrix::New(spec);
  }
  absl::StatusOr<std::unique_ptr<RowStore>> NewRowStore(const RowStoreSpec& spec) override {
    return HostRowStore::New(spec, context_, functions_);
  }

  Event Record() override { return 0; }
  void Wait(Event) override {}

  void Embedding(const EmbeddingArgs& args) override;
  void RmsNorm(const RmsNormArgs& args) override;
  void LayerNorm(const LayerNormArgs& args) override;
  void MatMul(const MatMulArgs& args) override;
  void Rope(const RopeArgs& args) override;
  void KvWrite(const KvWriteArgs& args) override;
  void MakeReady(std::vector<std::pair<void*, int64_t>> ranges) override {
    prefault_ = std::make_unique<Prefault>(std::move(ranges));
  }
  void KvCopy(const KvCopyArgs& args) override;
  void Attention(const AttentionArgs& args) override;
  void SiluProduct(const SiluProductArgs& args) override;
  void SigmoidGate(const SigmoidGateArgs& args) override;
  void ProductKeySearch(const ProductKeySearchArgs& args) override;
  void MaskRows(const MaskRowsArgs& args) override;
  void SelectBags(const SelectBagsArgs& args) override;
  void CountRows(const CountRowsArgs& args) override;
  void EmbeddingBag(const EmbeddingBagArgs& args) override;
  void RowDot(const RowDotArgs& args) override;
  void GeluScale(const GeluScaleArgs& args) override;
  void SelectRows(const SelectRowsArgs& args) override;
  void Sample(const SampleArgs& args) override;
  void TokenLogprob(const TokenLogprobArgs& args) override;
  void AdjustLogits(const AdjustLogitsArgs& args) override;
  void TopLogprobs(const TopLogprobsArgs& args) override;

 private:
  static void Copy(void* to, const void* from, int64_t bytes) {
    if (bytes > 0) std::memcpy(to, from, bytes);
  }

  Context context_;
  std::unique_ptr<Prefault> prefault_;
  Functions functions_{};
  const std::string isa_;
};

void CpuBackend::Embedding(const EmbeddingArgs& args) {
  const PackedMatrix& weight = Ours(args.weight);
  const int64_t num_tokens = args.token_ids.dim(0), dim = weight.spec().k;
  MEMSERVE_CHECK_EQ(weight.spec().groups, 1);
  MEMSERVE_CHECK_EQ(args.from_slot.dim(0), num_tokens);
  MEMSERVE_CHECK_EQ(args.out.dim(0), num_tokens);
  MEMSERVE_CHECK_EQ(args.out.dim(1), dim);
  context_.pool.ParallelFor(num_tokens, num_tokens * dim * 2.0, [&](int64_t t, int) {
    const int32_t slot = args.from_slot(t);
    MEMSERVE_CHECK(slot < args.sampled.dim(0));
    const int32_t token = slot >= 0 ? args.sampled(slot) : args.token_ids(t);
    MEMSERVE_CHECK(token >= 0 && token < weight.spec().n);
    weight.ReadRow(0, token, args.out.data + t * dim);
  });
}

void CpuBackend::RmsNorm(const RmsNormArgs& args) {
  if (args.delta) MEMSERVE_CHECK(args.delta.shape == args.x.shape);
  if (args.delta_on) MEMSERVE_CHECK_EQ(args.delta_on.dim(0), args.x.dim(0));
  if (args.out) {
    MEMSERVE_CHECK(args.out.shape == args.x.shape);
    MEMSERVE_CHECK_EQ(args.weight.dim(0), args.x.dim(1));
  }
  functions_.rms_norm(context_, args);
}

void CpuBackend::LayerNorm(const LayerNormArgs& args) {
  MEMSERVE_CHECK(args.out.shape == args.x.shape);
  MEMSERVE_CHECK_EQ(args.weight.dim(0), args.x.dim(1));
  if (args.bias) MEMSERVE_CHECK_EQ(args.bias.dim(0), args.x.dim(1));
  functions_.layer_norm(context_, args);
}

void CpuBackend::MatMul(const MatMulArgs& args) {
  const PackedMatrix& weight = Ours(args.weight);
  MEMSERVE_CHECK_EQ(weight.spec().groups, 1);
  MEMSERVE_CHECK_EQ(args.x.dim(1), weight.spec().k);
  MEMSERVE_CHECK_EQ(args.out.dim(0), args.x.dim(0));
  MEMSERVE_CHECK_EQ(args.out.dim(1), weight.spec().n);
  if (args.bias) MEMSERVE_CHECK_EQ(args.bias.dim(0), weight.spec().n);
  functions_.mat_mul(context_, weight, args);
}

void CpuBackend::Rope(const RopeArgs& args) {
  MEMSERVE_CHECK(2 * args.cos.dim(1) <= args.x.dim(2));
  MEMSERVE_CHECK(args.sin.shape == args.cos.shape);
  MEMSERVE_CHECK_EQ(args.positions.dim(0), args.x.dim(0));
  for (int64_t t = 0; t < args.x.dim(0); ++t) {
    MEMSERVE_CHECK(args.positions(t) >= 0 && args.positions(t) < args.cos.dim(0));
  }
  functions_.rope(context_, args);
}

void CheckPages(const KvPages& pages) {
  MEMSERVE_CHECK(pages.dtype == DType::kF32 || pages.dtype == DType::kBF16 || pages.quantised());
  MEMSERVE_CHECK_EQ(pages.page_size % kAttentionBlock, 0);
}

void CpuBackend::KvWrite(const KvWriteArgs& args) {
  CheckPages(args.pages);
  MEMSERVE_CHECK(args.v.shape == args.k.shape);
  MEMSERVE_CHECK_EQ(args.k.dim(1), args.pages.kv_heads);
  MEMSERVE_CHECK_EQ(args.k.dim(2), args.pages.head_dim);
  MEMSERVE_CHECK_EQ(args.slots.dim(0), args.k.dim(0));
  for (int64_t t = 0; t < args.k.dim(0); ++t) {
    MEMSERVE_CHECK(args.slots(t) >= 0 && args.slots(t) < args.pages.num_pages * args.pages.page_size);
  }
  functions_.kv_write(context_, args);
}

void CpuBackend::KvCopy(const KvCopyArgs& args) {
  CheckPages(args.pages);
  const int64_t bytes = args.pages.page_value_bytes(), scales = args.pages.page_scales();
  for (int64_t i = 0; i < args.pages_from_to.dim(0); ++i) {
    const int64_t from = args.pages_from_to(i, 0), to = args.pages_from_to(i, 1);
    MEMSERVE_CHECK(from >= 0 && from < args.pages.num_pages && to >= 0 && to < args.pages.num_pages && from != to);
    for (void* of : {args.pages.keys, args.pages.values})
      Copy(static_cast<char*>(of) + to * bytes, static_cast<const char*>(of) + from * bytes, bytes);
    if (!args.pages.quantised()) continue;
    for (float* of : {args.pages.key_scales(), args.pages.value_scales()}) {
      Copy(of + to * scales, of + from * scales, scales * static_cast<int64_t>(sizeof(float)));
    }
  }
}

void CpuBackend::Attention(const AttentionArgs& args) {
  CheckPages(args.pages);
  const int64_t num_tokens = args.q.dim(0);
  MEMSERVE_CHECK(args.out.shape == args.q.shape);
  MEMSERVE_CHECK_EQ(args.q.dim(2), args.pages.head_dim);
  MEMSERVE_CHECK_EQ(args.sequence.dim(0), num_tokens);
  MEMSERVE_CHECK_EQ(args.positions.dim(0), num_tokens);
  for (int64_t t = 0; t < num_tokens; ++t) {
    MEMSERVE_CHECK(args.sequence(t) >= 0 && args.sequence(t) < args.block_tables.dim(0));
    MEMSERVE_CHECK(args.positions(t) >= 0);
    MEMSERVE_CHECK(args.positions(t) / args.pages.page_size < args.block_tables.dim(1));
  }
  functions_.attention(context_, args);
}

void CpuBackend::SiluProduct(const SiluProductArgs& args) {
  MEMSERVE_CHECK(args.a.shape == args.out.shape);
  MEMSERVE_CHECK(args.b.shape == args.out.shape);
  functions_.silu_product(context_, args);
}

void CpuBackend::SigmoidGate(const SigmoidGateArgs& args) {
  MEMSERVE_CHECK_EQ(args.gate.dim(0), args.x.dim(0));
  MEMSERVE_CHECK_EQ(args.gate.dim(1), 1);
  functions_.sigmoid_gate(context_, args);
}

void CpuBackend::ProductKeySearch(const ProductKeySearchArgs& args) {
  const PackedMatrix& half_keys = Ours(args.half_keys);
  const int64_t num_tokens = args.query.dim(0), mem_heads = args.query.dim(1), knn = args.rows.dim(2);
  MEMSERVE_CHECK_EQ(args.query.dim(2), 2);
  MEMSERVE_CHECK_EQ(args.query.dim(3), half_keys.spec().k);
  MEMSERVE_CHECK_EQ(half_keys.spec().groups, mem_heads * 2);
  MEMSERVE_CHECK(1 <= knn && knn <= half_keys.spec().n && half_keys.spec().n <= 46340);
  MEMSERVE_CHECK_EQ(args.rows.dim(0), num_tokens);
  MEMSERVE_CHECK_EQ(args.rows.dim(1), mem_heads);
  MEMSERVE_CHECK(args.scores.shape == args.rows.shape);
  MEMSERVE_CHECK(args.weights.shape == args.rows.shape);
  if (args.knn_of_token) {
    MEMSERVE_CHECK_EQ(args.knn_of_token.dim(0), num_tokens);
    for (int64_t t = 0; t < num_tokens; ++t) {
      MEMSERVE_CHECK(args.knn_of_token(t) >= 0 && args.knn_of_token(t) <= knn);
    }
  }
  functions_.product_key_search(context_, half_keys, args);
}

void CpuBackend::MaskRows(const MaskRowsArgs& args) {
  MEMSERVE_CHECK(args.weights.shape == args.rows.shape);
  MEMSERVE_CHECK_EQ(args.sequence.dim(0), args.rows.dim(0));
  cpu::MaskRows(context_, args);
}

void CpuBackend::SelectBags(const SelectBagsArgs& args) {
  MEMSERVE_CHECK(args.weights.shape == args.rows.shape);
  MEMSERVE_CHECK(args.out_weights.shape == args.out_rows.shape);
  MEMSERVE_CHECK_EQ(args.out_rows.dim(0), args.tokens.dim(0));
  MEMSERVE_CHECK_EQ(args.out_rows.dim(1), args.rows.dim(1));
  cpu::SelectBags(args);
}

void CpuBackend::CountRows(const CountRowsArgs& args) { cpu::CountRows(args); }

void CpuBackend::EmbeddingBag(const EmbeddingBagArgs& args) { MEMSERVE_CHECK(args.table->Finish(args.table->Start(args)).ok()); }

void CpuBackend::RowDot(const RowDotArgs& args) {
  const HostRowStore& table = Ours(args.table);
  MEMSERVE_CHECK_EQ(args.x.dim(0), args.rows.dim(0));
  MEMSERVE_CHECK_EQ(args.x.dim(1), table.spec().dim);
  MEMSERVE_CHECK(args.out.shape == args.rows.shape);
  CheckRows(table.spec(), args.rows);
  functions_.row_dot(context_, table, args);
}

void CpuBackend::GeluScale(const GeluScaleArgs& args) {
  MEMSERVE_CHECK(args.weights.shape == args.dots.shape);
  const int64_t n = args.dots.dim(1);
  context_.pool.ParallelFor(args.dots.dim(0), args.dots.size() * 15.0, [&](int64_t t, int) {
    for (int64_t i = 0; i < n; ++i) {
      const float x = args.dots(t, i);
      args.weights(t, i) *= 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
    }
  });
}

void CpuBackend::SelectRows(const SelectRowsArgs& args) {
  const int64_t dim = args.x.dim(1);
  MEMSERVE_CHECK_EQ(args.out.dim(0), args.rows.dim(0));
  MEMSERVE_CHECK_EQ(args.out.dim(1), dim);
  for (int64_t s = 0; s < args.rows.dim(0); ++s) {
    MEMSERVE_CHECK(args.rows(s) >= 0 && args.rows(s) < args.x.dim(0));
    Copy(args.out.data + s * dim, args.x.data + args.rows(s) * dim, dim * sizeof(float));
  }
}

void CpuBackend::Sample(const SampleArgs& args) {
  const int64_t slots = args.logits.dim(0);
  MEMSERVE_CHECK_EQ(args.slots.dim(0), slots);
  MEMSERVE_CHECK_EQ(args.tokens.dim(0), slots);
  MEMSERVE_CHECK_EQ(args.logprobs.dim(0), slots);
  MEMSERVE_CHECK(slots == 0 || args.logits.dim(1) > 0);
  functions_.sample(context_, args);
}

void CpuBackend::TokenLogprob(const TokenLogprobArgs& args) {
  const int64_t slots = args.logits.dim(0);
  MEMSERVE_CHECK_EQ(args.targets.dim(0), slots);
  MEMSERVE_CHECK_EQ(args.logprobs.dim(0), slots);
  MEMSERVE_CHECK_EQ(args.is_greedy.dim(0), slots);
  for (int64_t s = 0; s < slots; ++s) MEMSERVE_CHECK(args.targets(s) >= -1 && args.targets(s) < args.logits.dim(1));
  functions_.token_logprob(context_, args);
}

void CpuBackend::AdjustLogits(const AdjustLogitsArgs& args) {
  MEMSERVE_CHECK(args.out.shape == args.logits.shape);
  MEMSERVE_CHECK_EQ(args.adjustments.dim(0), args.logits.dim(0));
  cpu::AdjustLogits(context_, args);
}

void CpuBackend::TopLogprobs(const TopLogprobsArgs& args) {
  MEMSERVE_CHECK_EQ(args.counts.dim(0), args.logits.dim(0));
  MEMSERVE_CHECK(args.tokens.shape == args.logprobs.shape && args.tokens.dim(0) == args.logits.dim(0));
  MEMSERVE_CHECK(args.chosen.size() == 0 ||
                 (args.chosen.dim(0) == args.logits.dim(0) && args.chosen_logprobs.shape == args.chosen.shape));
  functions_.top_logprobs(context_, args);
}

// The cores this process may run on.
int Cores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
  return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace
}  // namespace cpu

absl::StatusOr<std::unique_ptr<Backend>> NewCpuBackend(const CpuBackendOptions& options) {
  if (options.threads < 0 || options.threads > 1024) {
    return absl::InvalidArgumentError(absl::StrCat("threads is ", options.threads, "; it is 0 (one per core) to 1024"));
  }
  const std::vector<int64_t> targets = hwy::SupportedAndGeneratedTargets();  // best first
  int64_t target = targets.front();
  if (options.isa != "auto") {
    std::vector<std::string> names;
    target = 0;
    for (int64_t candidate : targets) {
      names.push_back(hwy::TargetName(candidate));
      if (names.back() == options.isa) target = candidate;
    }
    if (target == 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("instruction set \"", options.isa, "\" does not run here; these do: ", absl::StrJoin(names, ", ")));
    }
  }
  return std::make_unique<cpu::CpuBackend>(options.threads == 0 ? cpu::Cores() : options.threads, target);
}

}  // namespace memserve::kernels
