// One rank: a device with its share of weights, value table and KV pages, which executes batches. The first rank's results are the
// step's; with several ranks all of them execute every batch and meet in the collectives.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/batch.h"
#include "engine/model/transformer.h"
#include "kernels/collective.h"

namespace memserve::engine {

// What all ranks of an engine agree on.
struct RankOptions {
  WeightTypes types;
  kernels::DType kv_dtype = kernels::DType::kF32;
  int64_t kv_pages = 0;
  int64_t kv_page_size = 16;
  int64_t max_tokens = 0;     // of one step
  int64_t max_sequences = 0;  // of one step
  int64_t max_context_tokens = 0;
  bool count_rows = true;  // how often each row of the value tables is read
  int loader_threads = 1;

  int64_t pages_per_sequence() const { return (max_context_tokens + kv_page_size - 1) / kv_page_size; }
};

// Bytes that a rank holds, computed before anything is allocated.
struct RankPlan {
  int64_t weight_bytes = 0;
  int64_t table_bytes = 0;
  int64_t kv_bytes = 0;
  int64_t kv_bytes_per_page = 0;
  int64_t scratch_bytes = 0;
  int64_t count_bytes = 0;
  std::vector<std::string> unused_tensors;
  int64_t total() const { return weight_bytes + table_bytes + kv_bytes + scratch_bytes + count_bytes; }
};

// What a rank read.
struct RankLoaded {
  int64_t read_bytes = 0;
  std::map<std::string, int64_t> not_finite;  // by tensor: values that are NaN or infinite
};

// Used by one thread at a time (the rank's own).
class Rank {
 public:
  // Checks names and shapes of all tensors and counts bytes.
  static absl::StatusOr<RankPlan> Plan(const ModelConfig& config, const Shard& shard, const Checkpoint& checkpoint,
                                       const RankOptions& options);

  // `collective` null with one rank.
  static absl::StatusOr<std::unique_ptr<Rank>> Load(const ModelConfig& config, const Shard& shard, const Checkpoint& checkpoint,
                                                    const RankOptions& options, std::unique_ptr<kernels::Backend> backend,
                                                    std::unique_ptr<kernels::Collective> collective);

  // Enqueues a step. Up to two may be in flight; token ids of the second may refer to what the first samples.
  absl::Status Execute(const Batch& batch);
  // Waits for the oldest step in flight and takes its results.
  StepResult Collect();

  // Runs one batch by itself and gives the logits of its logit tokens, [num_slots, vocab_size]: for parity tests and perplexity.
  // `result`, if given, gets the rest.
  absl::StatusOr<std::vector<float>> ExecuteForLogits(const Batch& batch, StepResult* result = nullptr);

  // See Transformer::ReadRows.
  absl::StatusOr<std::vector<float>> ReadRows(int64_t table, bool experts, absl::Span<const int32_t> rows);
  // How often the rows [first, first + count) of a table were read, in all steps that were enqueued; `reset`: they start at 0
  // again. Of the first rank, with count_rows.
  std::vector<uint32_t> ReadCounts(int64_t table, int64_t first, int64_t count, bool reset);

  const RankLoaded& loaded() const { return loaded_; }
  const Transformer& model() const { return *model_; }
  const kernels::Backend& backend() const { return *backend_; }
  kernels::Collective* collective() const { return collective_.get(); }

 private:
  // Device arrays of one step. Two sets, used in turn.
  struct StepArrays {
    int32_t *token_ids, *from_slot, *positions, *sequence, *memory_knn, *masked_end, *masked_rows, *block_tables, *traced_tokens,
        *logit_tokens, *score_targets, *page_copies, *chosen_tokens;
    int64_t* kv_slots;
    kernels::SamplingSlot* sampling;
    kernels::LogitAdjustment* adjustments;
    int32_t *seen_tokens, *seen_counts, *bias_tokens, *top_counts;
    float* bias_values;
    uint32_t* masks;
    int32_t *sampled, *score_greedy, *top_tokens, *trace_rows;                          // out
    float *logprobs, *score_logprobs, *top_logprobs, *chosen_logprobs, *trace_weights;  // out
  };
  struct InFlight {
    int64_t num_sampled;
    int64_t num_scored;
    int64_t most_top_logprobs;
    int64_t most_chosen;
    int64_t num_traced;
    int set;
    double forward_seconds, sample_seconds;
    kernels::Backend::Event event;
  };

  Rank() = default;
  // With a null back end it only counts.
  static absl::StatusOr<std::unique_ptr<Rank>> Build(const ModelConfig& config, const Shard& shard, const Checkpoint& checkpoint,
                                                     const RankOptions& options, WeightLoader& loader, Workspace& workspace,
                                                     kernels::Backend* backend, RankPlan& plan);
  std::vector<bool> SpreadKnn(const Batch& batch);
  ForwardContext CopyToDevice(const Batch& batch, const StepArrays& arrays);
  // Returns the seconds that the logits took.
  double SampleAndScore(const ForwardContext& context, const Batch& batch, const StepArrays& arrays);
  void TellLogprobs(const Batch& batch, const StepArrays& arrays, int64_t begin, int64_t chosen,
                    kernels::TensorView<const float, 2> logits);
  void SampleAdjusted(const Batch& batch, const StepArrays& arrays, int64_t begin, kernels::TensorView<const float, 2> logits);

  const ModelConfig* config_ = nullptr;
  RankOptions options_;
  RankLoaded loaded_;
  std::unique_ptr<kernels::Backend> backend_;
  std::unique_ptr<kernels::Collective> collective_;
  std::unique_ptr<Workspace> workspace_;
  std::unique_ptr<Transformer> model_;
  std::vector<kernels::KvPages> pages_;  // [n_layers]
  StepArrays arrays_[2];
  float* logits_ = nullptr;     // [max_logit_rows, vocab_size]
  float* adjusted_ = nullptr;   // the same, of at most max_sequences rows
  int32_t* ignored_ = nullptr;  // [max_sequences]
  int next_set_ = 0;
  std::vector<InFlight> in_flight_;
  std::vector<int32_t> token_knn_;  // host, scratch of CopyToDevice: [memory layers or 1, num_tokens]
};

}  // namespace memserve::engine
