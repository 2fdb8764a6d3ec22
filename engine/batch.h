// The flat arrays of one step: which tokens run, where they stand, which of them want logits. Made by the scheduler, executed by every
// rank; plain vectors, so that it can be sent to followers on other nodes and replayed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/logit_adjustment.h"
#include "kernels/sampling.h"

namespace memserve::engine {

// Limits of what one sequence asks for in a step (validate.h holds requests to them).
inline constexpr int64_t kMaxTopLogprobs = 20;
inline constexpr size_t kMaxMaskedRows = 1024;
inline constexpr int64_t kMaxBiasedTokens = 1024;                        // by logit_bias, and as many banned
inline constexpr int64_t kMaxBadWords = 128;                             // each encoded in two ways
inline constexpr int64_t kMaxChosenLogprobs = 64;
inline constexpr int64_t kMostBiasEntries = 2 * kMaxBiasedTokens + 2 * kMaxBadWords + 256;  // those, and the ids that stop

struct Batch {
  int64_t step = 0;

  // One entry for each token, tokens of a sequence in order.  [num_tokens]
  std::vector<int32_t> token_ids;
  std::vector<int32_t> from_slot;   // >= 0: the token is what this logit slot of the step before sampled; else -1
  std::vector<int32_t> positions;   // in its sequence
  std::vector<int32_t> sequence;    // row of block_tables and of the per-sequence arrays
  std::vector<int64_t> kv_slots;    // where its key and value go: page · page_size + place in it

  // One entry for each sequence.  [num_sequences]
  std::vector<int32_t> memory_knn;  // rows per memory head: 1 … mem_knn, or 0 with the memory off
  std::vector<int32_t> masked_end;  // where its rows end in masked_rows
  int64_t pages_per_sequence = 0;
  std::vector<int32_t> block_tables;  // [num_sequences, pages_per_sequence], -1 beyond a sequence's pages

  // Of all sequences.
  std::vector<int32_t> layers_off;   // pairs of sequence and memory layer (its place among them) that is off for it
  std::vector<int32_t> masked_rows;  // value table rows that are left out: a sequence's after those of the one before, ascending

  // Pages of the KV cache that are copied before the step runs: pairs of from and to.
  std::vector<int32_t> page_copies;

  // Tokens whose memory reads are told: index of the token.  [num_traced]
  std::vector<int32_t> traced_tokens;

  // One entry for each token that wants logits: first those that sample, then those that are scored.  [num_slots]
  std::vector<int32_t> logit_tokens;               // index of the token
  std::vector<kernels::SamplingSlot> sampling;     // [slots that sample]
  std::vector<int32_t> score_targets;              // [slots that are scored]: the token whose log-probability is asked for
  std::vector<int32_t> top_logprobs;  // [num_slots]: how many of the likeliest tokens are asked for; empty: none, nor chosen
  int64_t most_chosen = 0;
  std::vector<int32_t> chosen_tokens;  // [slots that sample, most_chosen]: whose log-probabilities are asked for, -1 beyond

  // The first slots that sample have their logits adjusted before.  [num_adjusted]
  std::vector<kernels::LogitAdjustment> adjustments;
  std::vector<int32_t> seen_tokens, seen_counts;
  std::vector<int32_t> bias_tokens;
  std::vector<float> bias_values;
  std::vector<uint32_t> masks;                     // [rows, ⌈vocab_size / 32⌉]

  int64_t num_tokens() const { return static_cast<int64_t>(token_ids.size()); }
  int64_t num_sequences() const { return static_cast<int64_t>(memory_knn.size()); }
  int64_t num_slots() const { return static_cast<int64_t>(logit_tokens.size()); }
  int64_t num_sampled() const { return static_cast<int64_t>(sampling.size()); }
  int64_t num_traced() const { return static_cast<int64_t>(traced_tokens.size()); }
  int64_t num_adjusted() const { return static_cast<int64_t>(adjustments.size()); }
  int64_t most_top_logprobs() const { return top_logprobs.empty() ? 0 : *std::max_element(top_logprobs.begin(), top_logprobs.end()); }
};

// What a step gives back.
struct StepResult {
  std::vector<int32_t> tokens;         // [slots that sample]
  std::vector<float> logprobs;         // [slots that sample], of the token drawn
  std::vector<int32_t> top_tokens;     // [num_slots, most of top_logprobs], -1 beyond a slot's number
  std::vector<float> top_logprobs;     // beside top_tokens
  std::vector<float> chosen_logprobs;  // [slots that sample, most_chosen]
  std::vector<float> score_logprobs;   // [slots that are scored]
  std::vector<int32_t> score_greedy;   // [slots that are scored]: 1 where the target is the first choice
  std::vector<int32_t> trace_rows;     // [memory layers, num_traced, mem_heads, mem_knn], -1 for none: fewer are kept, masked, off
  std::vector<float> trace_weights;    // beside trace_rows
  double forward_seconds = 0;          // to enqueue the model, which on cpu is to compute it
  double sample_seconds = 0;           // likewise, from logits to tokens and scores
};

}  // namespace memserve::engine
