// The decoder: embedding, then per layer attention and feed-forward or memory layer, then logits.
//   h = x + Attention(norm(x));   out = h + FeedForward(norm(h))
#pragma once

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/model/attention.h"
#include "engine/model/feed_forward.h"
#include "engine/model/memory_layer.h"
#include "engine/model/shard.h"
#include "engine/model/value_table.h"
#include "engine/model/workspace.h"

namespace memserve::engine {

// What a model is asked to be able to do.
struct ModelLimits {
  int64_t max_tokens = 0;     // of one step
  int64_t max_positions = 0;  // of one sequence
  bool count_rows = false;    // whether the reads of each value table row are counted
};

// Where a step's tokens come from.
struct TokenInput {
  kernels::TensorView<const int32_t, 1> token_ids;
  kernels::TensorView<const int32_t, 1> from_slot;
  kernels::TensorView<const int32_t, 1> sampled;  // by the step before
};

class Transformer {
 public:
  // One rank's share. With a planning loader nothing is allocated and the transformer cannot run.
  // `config` and `checkpoint` (while loading) must outlive it.
  static absl::StatusOr<std::unique_ptr<Transformer>> Load(const ModelConfig& config, const Shard& shard, const Checkpoint& checkpoint,
                                                           const ModelLimits& limits, WeightLoader& loader, Workspace& workspace,
                                                           kernels::Backend* backend);

  // Runs the tokens of a step and writes their keys and values; the residual stream before the last norm stays inside for Logits.
  absl::Status Forward(const ForwardContext& context, const TokenInput& input, const std::vector<kernels::KvPages>& pages) const;

  // logits[s, :] of the tokens `rows` [slots] of the last Forward. At most max_logit_rows() at a time.
  void Logits(const ForwardContext& context, kernels::TensorView<const int32_t, 1> rows, kernels::TensorView<float, 2> logits) const;
  int64_t max_logit_rows() const { return max_logit_rows_; }

  // This rank's columns of chosen rows of a value table, widened to float: [rows.size(), columns]. `experts`: of PEER's u. Uses the
  // scratch of a step: none may be under way on another thread. An error only for what a row store can get wrong.
  absl::StatusOr<std::vector<float>> ReadRows(kernels::Backend& backend, int64_t table, bool experts,
                                              absl::Span<const int32_t> rows) const;

  const std::vector<std::unique_ptr<ValueTable>>& value_tables() const { return tables_; }
  int64_t count_bytes() const { return count_bytes_; }  // that row counters take of the workspace

 private:
  struct Layer {
    Vector attention_norm;
    Vector ffn_norm;
    std::unique_ptr<Attention> attention;
    std::unique_ptr<FeedForward> feed_forward;   // either
    std::unique_ptr<MemoryLayer> memory;         // or
  };

  static absl::StatusOr<Layer> LoadLayer(const ModelConfig& config, const Shard& shard, int layer,
                                         const std::vector<std::unique_ptr<ValueTable>>& tables, WeightLoader& loader);

  const kernels::WeightMatrix& output() const { return output_ != nullptr ? *output_ : *embedding_; }

  const ModelConfig* config_ = nullptr;
  Shard shard_;
  Matrix embedding_;  // replicated
  Matrix output_;     // vocabulary rows of this rank; null where the embedding serves (tied, one rank)
  Vector norm_;
  std::vector<std::unique_ptr<ValueTable>> tables_;
  std::vector<Layer> layers_;
  RopeTables rope_;
  std::unique_ptr<AttentionScratch> attention_scratch_;
  std::unique_ptr<FeedForwardScratch> feed_forward_scratch_;
  std::unique_ptr<MemoryScratch> memory_scratch_;
  float* x_ = nullptr;             // [max_tokens, dim], the residual stream
  float* normed_ = nullptr;        // [max_tokens, dim]
  float* delta_ = nullptr;         // [max_tokens, dim], what a block adds
  float* selected_ = nullptr;      // [max_logit_rows, dim]
  float* local_logits_ = nullptr;  // [max_logit_rows, vocabulary of this rank], several ranks only
  int64_t max_logit_rows_ = 0;
  int64_t max_tokens_ = 0;
  int64_t count_bytes_ = 0;
};

}  // namespace memserve::engine
