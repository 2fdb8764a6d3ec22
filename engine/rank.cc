#include "engine/rank.h"

#include <algorithm>
#include <chrono>
#include <optional>

#include "absl/strings/str_cat.h"
#include "engine/model/load_macros.h"

namespace memserve::engine {
namespace {

using Clock = std::chrono::steady_clock;
double SecondsSince(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

}  // namespace

using kernels::TensorView;

absl::StatusOr<std::unique_ptr<Rank>> Rank::Build(const ModelConfig& config, const Shard& shard, const Checkpoint& checkpoint,
                                                  const RankOptions& options, WeightLoader& loader, Workspace& workspace,
                                                  kernels::Backend* backend, RankPlan& plan) {
  std::unique_ptr<Rank> rank(new Rank);
  rank->config_ = &config;
  rank->options_ = options;
  const ModelLimits limits = {
      .max_tokens = options.max_tokens, .max_positions = options.max_context_tokens, .count_rows = options.count_rows};
  LOAD_OR_RETURN(rank->model_, Transformer::Load(config, shard, checkpoint, limits, loader, workspace, backend));

  const int64_t tokens = options.max_tokens;
  const int64_t trace_entries = static_cast<int64_t>(config.memory.layers.size()) * config.memory.mem_heads * config.memory.mem_knn;
  for (StepArrays& set : rank->arrays_) {
    set.token_ids = workspace.Take<int32_t>(tokens, 1);
    set.from_slot = workspace.Take<int32_t>(tokens, 1);
    set.positions = workspace.Take<int32_t>(tokens, 1);
    set.sequence = workspace.Take<int32_t>(tokens, 1);
    set.memory_knn = workspace.Take<int32_t>(std::max<int64_t>(1, static_cast<int64_t>(config.memory.layers.size())), tokens);
    set.kv_slots = workspace.Take<int64_t>(tokens, 1);
    set.block_tables = workspace.Take<int32_t>(options.max_sequences, options.pages_per_sequence());
    set.traced_tokens = workspace.Take<int32_t>(tokens, 1);
    set.trace_rows = workspace.Take<int32_t>(tokens, trace_entries);
    set.trace_weights = workspace.Take(tokens, trace_entries);
    set.logit_tokens = workspace.Take<int32_t>(tokens, 1);
    set.sampling = workspace.Take<kernels::SamplingSlot>(tokens, 1);
    set.score_targets = workspace.Take<int32_t>(tokens, 1);
    set.sampled = workspace.Take<int32_t>(tokens, 1);
    set.logprobs = workspace.Take(tokens, 1);
    set.score_logprobs = workspace.Take(tokens, 1);
    set.score_greedy = workspace.Take<int32_t>(tokens, 1);
    // For requests that ask for more than most do: memory that is not touched costs nothing.
    const int64_t sequences = options.max_sequences;
    set.adjustments = workspace.Take<kernels::LogitAdjustment>(sequences, 1);
    set.seen_tokens = workspace.Take<int32_t>(sequences, options.max_context_tokens);
    set.seen_counts = workspace.Take<int32_t>(sequences, options.max_context_tokens);
    set.bias_tokens = workspace.Take<int32_t>(sequences, kMostBiasEntries);
    set.bias_values = workspace.Take(sequences, kMostBiasEntries);
    set.masks = workspace.Take<uint32_t>(sequences, (config.vocab_size + 31) / 32);
    set.masked_end = workspace.Take<int32_t>(sequences, 1);
    set.masked_rows = workspace.Take<int32_t>(sequences, static_cast<int64_t>(kMaxMaskedRows));
    set.top_counts = workspace.Take<int32_t>(tokens, 1);
    set.top_tokens = workspace.Take<int32_t>(tokens, kMaxTopLogprobs);
    set.top_logprobs = workspace.Take(tokens, kMaxTopLogprobs);
    set.chosen_tokens = workspace.Take<int32_t>(sequences, kMaxChosenLogprobs);
    set.chosen_logprobs = workspace.Take(sequences, kMaxChosenLogprobs);
    set.page_copies = workspace.Take<int32_t>(sequences, 2);
  }
  rank->adjusted_ = workspace.Take(std::min(rank->model_->max_logit_rows(), options.max_sequences), config.vocab_size);
  rank->ignored_ = workspace.Take<int32_t>(options.max_sequences, 1);
  rank->logits_ = workspace.Take(rank->model_->max_logit_rows(), config.vocab_size);
  plan.count_bytes = rank->model_->count_bytes();
  plan.scratch_bytes = workspace.bytes() - plan.count_bytes;

  for (int layer = 0; layer < config.n_layers; ++layer) {
    kernels::KvPages pages = {.dtype = options.kv_dtype,
                              .num_pages = options.kv_pages,
                              .page_size = options.kv_page_size,
                              .kv_heads = shard.KvHeads(config).size(),
                              .head_dim = config.head_dim};
    pages.keys = workspace.Take<char>(pages.bytes_each(), 1);
    pages.values = workspace.Take<char>(pages.bytes_each(), 1);
    rank->pages_.push_back(pages);
    plan.kv_bytes_per_page += 2 * pages.page_bytes_each();
  }
  plan.kv_bytes = plan.kv_bytes_per_page * options.kv_pages;
  plan.weight_bytes = loader.weight_bytes();
  plan.table_bytes = loader.table_bytes();
  if (!workspace.status().ok()) return workspace.status();
  return rank;
}

absl::StatusOr<RankPlan> Rank::Plan(const ModelConfig& config, const Shard& shard, const Checkpoint& checkpoint,
                                    const RankOptions& options) {
  WeightLoader loader(checkpoint, config.names, options.types, nullptr);
  Workspace workspace(nullptr);
  RankPlan plan;
  absl::StatusOr<std::unique_ptr<Rank>> rank = Build(config, shard, checkpoint, options, loader, workspace, nullptr, plan);
  if (!rank.ok()) return rank.status();
  plan.unused_tensors = loader.UnusedTensors();
  for (const std::string& unused : plan.unused_tensors) {
    const std::optional<std::string> key = config.names.ContradictedKey(unused, config.n_layers);
    if (!key) continue;
    const TensorInfo& tensor = *checkpoint.Find(unused);
    return absl::InvalidArgumentError(absl::StrCat(checkpoint.path(tensor), ": has the tensor '", unused, "', ", Describe(tensor),
                                                   "; by config.json the model has none there (", *key, ")"));
  }
  return plan;
}

absl::StatusOr<std::unique_ptr<Rank>> Rank::Load(const ModelConfig& config, const Shard& shard, const Checkpoint& checkpoint,
                                                 const RankOptions& options, std::unique_ptr<kernels::Backend> backend,
                                                 std::unique_ptr<kernels::Collective> collective) {
  WeightLoader loader(checkpoint, config.names, options.types, backend.get());
  auto workspace = std::make_unique<Workspace>(backend.get());
  RankPlan plan;
  LOAD_OR_RETURN(std::unique_ptr<Rank> rank, Build(config, shard, checkpoint, options, loader, *workspace, backend.get(), plan));
  if (absl::Status s = loader.Run(options.loader_threads); !s.ok()) return s;
  // What a small model needs is there at its first step.
  std::vector<std::pair<void*, int64_t>> pages;
  for (const kernels::KvPages& layer : rank->pages_) {
    if (layer.bytes_each() < (int64_t{4} << 20)) continue;
    pages.insert(pages.end(), {{layer.keys, layer.bytes_each()}, {layer.values, layer.bytes_each()}});
  }
  if (!pages.empty()) backend->MakeReady(std::move(pages));
  rank->loaded_ = {.read_bytes = loader.read_bytes(), .not_finite = loader.not_finite()};
  rank->workspace_ = std::move(workspace);
  rank->backend_ = std::move(backend);
  rank->collective_ = std::move(collective);
  return rank;
}

// Fills token_knn_: each token's rows per memory head, in all memory layers alike or in each. Returns which layers any token uses.
std::vector<bool> Rank::SpreadKnn(const Batch& batch) {
  const int64_t tokens = batch.num_tokens(), layers = static_cast<int64_t>(config_->memory.layers.size());
  const int64_t rows = batch.layers_off.empty() ? 1 : layers;
  token_knn_.resize(rows * tokens);
  std::vector<bool> memory_on(layers);
  std::vector<int32_t> knn;  // [num_sequences]
  for (int64_t m = 0; m < rows; ++m) {
    knn = batch.memory_knn;
    for (size_t i = 0; i < batch.layers_off.size(); i += 2) {
      if (batch.layers_off[i + 1] == m) knn[batch.layers_off[i]] = 0;
    }
    for (int64_t t = 0; t < tokens; ++t) token_knn_[m * tokens + t] = knn[batch.sequence[t]];
    const bool on = std::any_of(knn.begin(), knn.end(), [](int32_t rows_of) { return rows_of > 0; });
    if (rows == layers)
      memory_on[m] = on;
    else
      memory_on.assign(layers, on);
  }
  return memory_on;
}

ForwardContext Rank::CopyToDevice(const Batch& batch, const StepArrays& arrays) {
  const auto copy = [this](auto* device, const auto& host) {
    static_assert(sizeof(*device) == sizeof(host[0]));
    if (!host.empty()) backend_->CopyToDevice(device, host.data(), static_cast<int64_t>(host.size() * sizeof(host[0])));
  };
  std::vector<bool> memory_on = SpreadKnn(batch);
  copy(arrays.token_ids, batch.token_ids);
  copy(arrays.from_slot, batch.from_slot);
  copy(arrays.positions, batch.positions);
  copy(arrays.sequence, batch.sequence);
  copy(arrays.memory_knn, token_knn_);
  copy(arrays.masked_rows, batch.masked_rows);
  if (!batch.masked_rows.empty()) copy(arrays.masked_end, batch.masked_end);
  copy(arrays.traced_tokens, batch.traced_tokens);
  copy(arrays.kv_slots, batch.kv_slots);
  copy(arrays.block_tables, batch.block_tables);
  copy(arrays.logit_tokens, batch.logit_tokens);
  copy(arrays.sampling, batch.sampling);
  copy(arrays.score_targets, batch.score_targets);
  copy(arrays.adjustments, batch.adjustments);
  copy(arrays.seen_tokens, batch.seen_tokens);
  copy(arrays.seen_counts, batch.seen_counts);
  copy(arrays.bias_tokens, batch.bias_tokens);
  copy(arrays.bias_values, batch.bias_values);
  copy(arrays.masks, batch.masks);
  copy(arrays.top_counts, batch.top_logprobs);
  copy(arrays.chosen_tokens, batch.chosen_tokens);
  copy(arrays.page_copies, batch.page_copies);
  const int64_t tokens = batch.num_tokens();
  return {.backend = backend_.get(),
          .collective = collective_.get(),
          .num_tokens = tokens,
          .positions = {arrays.positions, {tokens}},
          .sequence = {arrays.sequence, {tokens}},
          .kv_slots = {arrays.kv_slots, {tokens}},
          .memory_knn = {arrays.memory_knn, {static_cast<int64_t>(token_knn_.size()) / std::max<int64_t>(1, tokens), tokens}},
          .memory_on = std::move(memory_on),
          .masked_end = {arrays.masked_end, {static_cast<int64_t>(batch.masked_end.size())}},
          .masked_rows = {arrays.masked_rows, {static_cast<int64_t>(batch.masked_rows.size())}},
          .block_tables = {arrays.block_tables, {batch.num_sequences(), batch.pages_per_sequence}},
          .traced_tokens = {arrays.traced_tokens, {batch.num_traced()}},
          .trace_rows = arrays.trace_rows,
          .trace_weights = arrays.trace_weights};
}

// Logits in slices that fit their buffer; a slice holds slots of one kind: adjusted, sampled as they are, or scored.
double Rank::SampleAndScore(const ForwardContext& context, const Batch& batch, const StepArrays& arrays) {
  const int64_t vocab = config_->vocab_size, adjusted = batch.num_adjusted();
  double logits_seconds = 0;
  for (int64_t begin = 0; begin < batch.num_slots();) {
    const int64_t kind_end = begin < adjusted ? adjusted : begin < batch.num_sampled() ? batch.num_sampled() : batch.num_slots();
    const int64_t count = std::min(model_->max_logit_rows(), kind_end - begin);
    const TensorView<float, 2> logits(logits_, {count, vocab});
    const Clock::time_point logits_begin = Clock::now();
    model_->Logits(context, {arrays.logit_tokens + begin, {count}}, logits);
    logits_seconds += SecondsSince(logits_begin);
    if (begin < batch.num_sampled()) {
      if (begin < adjusted) {
        SampleAdjusted(batch, arrays, begin, logits);
      } else {
        backend_->Sample({.logits = logits,
                          .slots = {arrays.sampling + begin, {count}},
                          .tokens = {arrays.sampled + begin, {count}},
                          .logprobs = {arrays.logprobs + begin, {count}}});
      }
      TellLogprobs(batch, arrays, begin, batch.most_chosen, logits);
    } else {
      const int64_t scored = begin - batch.num_sampled();
      backend_->TokenLogprob({.logits = logits,
                              .targets = {arrays.score_targets + scored, {count}},
                              .logprobs = {arrays.score_logprobs + scored, {count}},
                              .is_greedy = {arrays.score_greedy + scored, {count}}});
      TellLogprobs(batch, arrays, begin, /*chosen=*/0, logits);
    }
    begin += count;
  }
  return logits_seconds;
}

// What is told beside the slots from `begin` on.
void Rank::TellLogprobs(const Batch& batch, const StepArrays& arrays, int64_t begin, int64_t chosen,
                        TensorView<const float, 2> logits) {
  const int64_t count = logits.dim(0), most = batch.most_top_logprobs();
  if (most == 0 && chosen == 0) return;
  backend_->TopLogprobs({.logits = logits,
                         .counts = {arrays.top_counts + begin, {count}},
                         .tokens = {arrays.top_tokens + begin * most, {count, most}},
                         .logprobs = {arrays.top_logprobs + begin * most, {count, most}},
                         .chosen = {arrays.chosen_tokens + begin * chosen, {count, chosen}},
                         .chosen_logprobs = {arrays.chosen_logprobs + begin * chosen, {count, chosen}}});
}

// Draws from adjusted logits; the log-probability told is that of the model's own.
void Rank::SampleAdjusted(const Batch& batch, const StepArrays& arrays, int64_t begin, TensorView<const float, 2> logits) {
  const int64_t count = logits.dim(0), vocab = logits.dim(1), words = (vocab + 31) / 32;
  const TensorView<float, 2> adjusted(adjusted_, {count, vocab});
  const auto size = [](const auto& list) { return static_cast<int64_t>(list.size()); };
  backend_->AdjustLogits({.logits = logits,
                          .adjustments = {arrays.adjustments + begin, {count}},
                          .seen_tokens = {arrays.seen_tokens, {size(batch.seen_tokens)}},
                          .seen_counts = {arrays.seen_counts, {size(batch.seen_counts)}},
                          .bias_tokens = {arrays.bias_tokens, {size(batch.bias_tokens)}},
                          .bias_values = {arrays.bias_values, {size(batch.bias_values)}},
                          .masks = {arrays.masks, {size(batch.masks) / words, words}},
                          .out = adjusted});
  backend_->Sample({.logits = adjusted,
                    .slots = {arrays.sampling + begin, {count}},
                    .tokens = {arrays.sampled + begin, {count}},
                    .logprobs = {arrays.logprobs + begin, {count}}});
  backend_->TokenLogprob({.logits = logits,
                          .targets = {arrays.sampled + begin, {count}},
                          .logprobs = {arrays.logprobs + begin, {count}},
                          .is_greedy = {ignored_, {count}}});
}

absl::Status Rank::Execute(const Batch& batch) {
  MEMSERVE_CHECK(in_flight_.size() < 2);
  MEMSERVE_CHECK(batch.num_tokens() <= options_.max_tokens && batch.num_sequences() <= options_.max_sequences);
  MEMSERVE_CHECK(batch.masked_rows.size() <= batch.masked_end.size() * kMaxMaskedRows);
  MEMSERVE_CHECK(batch.pages_per_sequence <= options_.pages_per_sequence());
  const int set = next_set_;
  next_set_ = 1 - next_set_;
  const StepArrays& arrays = arrays_[set];
  const ForwardContext context = CopyToDevice(batch, arrays);
  const TokenInput input = {.token_ids = {arrays.token_ids, {batch.num_tokens()}},
                            .from_slot = {arrays.from_slot, {batch.num_tokens()}},
                            .sampled = {arrays_[1 - set].sampled, {options_.max_tokens}}};
  const Clock::time_point begin = Clock::now();
  if (!batch.page_copies.empty()) {
    const TensorView<const int32_t, 2> copies(arrays.page_copies, {static_cast<int64_t>(batch.page_copies.size()) / 2, 2});
    for (const kernels::KvPages& pages : pages_) backend_->KvCopy({.pages_from_to = copies, .pages = pages});
  }
  if (absl::Status s = model_->Forward(context, input, pages_); !s.ok()) return s;
  const double model_seconds = SecondsSince(begin);
  const Clock::time_point slots_begin = Clock::now();
  const double logits_seconds = SampleAndScore(context, batch, arrays);
  in_flight_.push_back({.num_sampled = batch.num_sampled(),
                        .num_scored = batch.num_slots() - batch.num_sampled(),
                        .most_top_logprobs = batch.most_top_logprobs(),
                        .most_chosen = batch.most_chosen,
                        .num_traced = batch.num_traced(),
                        .set = set,
                        .forward_seconds = model_seconds + logits_seconds,
                        .sample_seconds = SecondsSince(slots_begin) - logits_seconds,
                        .event = backend_->Record()});
  return absl::OkStatus();
}

absl::StatusOr<std::vector<float>> Rank::ExecuteForLogits(const Batch& batch, StepResult* result) {
  MEMSERVE_CHECK(in_flight_.empty());
  if (absl::Status s = Execute(batch); !s.ok()) return s;
  const StepArrays& arrays = arrays_[in_flight_.front().set];
  StepResult collected = Collect();
  if (result != nullptr) *result = std::move(collected);
  const int64_t vocab = config_->vocab_size;
  const ForwardContext context = {.backend = backend_.get(), .collective = collective_.get(), .num_tokens = batch.num_tokens()};
  std::vector<float> all(batch.num_slots() * vocab);
  for (int64_t begin = 0; begin < batch.num_slots(); begin += model_->max_logit_rows()) {
    const int64_t count = std::min(model_->max_logit_rows(), batch.num_slots() - begin);
    model_->Logits(context, {arrays.logit_tokens + begin, {count}}, {logits_, {count, vocab}});
    backend_->Wait(backend_->Record());
    backend_->CopyToHost(all.data() + begin * vocab, logits_, count * vocab * static_cast<int64_t>(sizeof(float)));
  }
  return all;
}

absl::StatusOr<std::vector<float>> Rank::ReadRows(int64_t table, bool experts, absl::Span<const int32_t> rows) {
  return model_->ReadRows(*backend_, table, experts, rows);
}

std::vector<uint32_t> Rank::ReadCounts(int64_t table, int64_t first, int64_t count, bool reset) {
  uint32_t* const device = model_->value_tables()[table]->counts;
  MEMSERVE_CHECK(device != nullptr);
  const int64_t bytes = count * static_cast<int64_t>(sizeof(uint32_t));
  std::vector<uint32_t> counts(count);
  backend_->Wait(backend_->Record());
  backend_->CopyToHost(counts.data(), device + first, bytes);
  if (reset) backend_->CopyToDevice(device + first, std::vector<uint32_t>(count).data(), bytes);
  return counts;
}

StepResult Rank::Collect() {
  MEMSERVE_CHECK(!in_flight_.empty());
  const InFlight step = in_flight_.front();
  in_flight_.erase(in_flight_.begin());
  backend_->Wait(step.event);
  const StepArrays& arrays = arrays_[step.set];
  StepResult result;
  result.forward_seconds = step.forward_seconds;
  result.sample_seconds = step.sample_seconds;
  const auto copy = [this](auto& host, const auto* device, int64_t count) {
    host.resize(count);
    if (count > 0) backend_->CopyToHost(host.data(), device, count * static_cast<int64_t>(sizeof(host[0])));
  };
  copy(result.tokens, arrays.sampled, step.num_sampled);
  copy(result.logprobs, arrays.logprobs, step.num_sampled);
  copy(result.top_tokens, arrays.top_tokens, (step.num_sampled + step.num_scored) * step.most_top_logprobs);
  copy(result.top_logprobs, arrays.top_logprobs, (step.num_sampled + step.num_scored) * step.most_top_logprobs);
  copy(result.chosen_logprobs, arrays.chosen_logprobs, step.num_sampled * step.most_chosen);
  copy(result.score_logprobs, arrays.score_logprobs, step.num_scored);
  copy(result.score_greedy, arrays.score_greedy, step.num_scored);
  const MemoryConfig& memory = config_->memory;
  const int64_t traced = step.num_traced * static_cast<int64_t>(memory.layers.size()) * memory.mem_heads * memory.mem_knn;
  copy(result.trace_rows, arrays.trace_rows, traced);
  copy(result.trace_weights, arrays.trace_weights, traced);
  return result;
}

}  // namespace memserve::engine
