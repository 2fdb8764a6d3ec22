#include "engine/memory_trace.h"

#include <algorithm>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace memserve::engine {
namespace {

absl::Status Bad(absl::string_view field, absl::string_view message) {
  return absl::InvalidArgumentError(absl::StrCat("memory_trace", field, ": ", message));
}

}  // namespace

void SequenceTrace::Add(TokenTrace trace) {
  while (!waiting.empty() && waiting.back().position >= trace.position) waiting.pop_back();
  if (trace.position >= next) waiting.push_back(std::move(trace));
}

std::vector<TokenTrace> SequenceTrace::TakeBefore(int64_t position) {
  const auto last =
      std::find_if(waiting.begin(), waiting.end(), [&](const TokenTrace& trace) { return trace.position >= position; });
  std::vector<TokenTrace> taken(std::make_move_iterator(waiting.begin()), std::make_move_iterator(last));
  waiting.erase(waiting.begin(), last);
  if (!taken.empty()) next = taken.back().position + 1;
  return taken;
}

absl::Status Validate(const MemoryTraceParams& params, const MemoryConfig& config) {
  if (config.layers.empty()) return absl::UnimplementedError("memory_trace: the model has no memory layers");
  if (params.tokens && *params.tokens < 0) return Bad(".tokens", absl::StrCat(*params.tokens, " is not at least 0"));
  if (params.prompt_tokens < 0) return Bad(".prompt_tokens", absl::StrCat(params.prompt_tokens, " is not at least 0"));
  if (params.entries && (*params.entries < 1 || *params.entries > config.mem_knn)) {
    return Bad(".entries", absl::StrCat(*params.entries, " is not in [1, ", config.mem_knn, "]"));
  }
  if (params.layers.size() > config.layers.size()) {
    return Bad(".layers",
               absl::StrCat("has ", params.layers.size(), " entries; the model has ", config.layers.size(), " memory layers"));
  }
  for (int32_t layer : params.layers) {
    if (std::find(config.layers.begin(), config.layers.end(), layer) != config.layers.end()) continue;
    return Bad(".layers", absl::StrCat("layer ", layer, " has no memory; these do: ", absl::StrJoin(config.layers, ", ")));
  }
  return absl::OkStatus();
}

absl::StatusOr<SequenceTrace> Resolve(const MemoryTraceParams& params, const MemoryConfig& config, int64_t prompt_tokens,
                                      int64_t max_draws, int64_t max_entries) {
  SequenceTrace trace;
  trace.entries = params.entries.value_or(config.mem_knn);
  for (size_t i = 0; i < config.layers.size(); ++i) {
    const bool chosen = std::find(params.layers.begin(), params.layers.end(), config.layers[i]) != params.layers.end();
    if (chosen || params.layers.empty()) trace.layers.push_back(static_cast<int32_t>(i));
  }
  const int64_t of_token = static_cast<int64_t>(trace.layers.size()) * config.mem_heads * trace.entries;
  const int64_t fit = max_entries / of_token;
  // The token drawn first comes of the prompt's last position: it is told once.
  const int64_t prompt = std::min<int64_t>(params.prompt_tokens, prompt_tokens);
  const int64_t before = std::max<int64_t>(prompt - 1, 0);
  const int64_t drawn =
      params.tokens ? std::min<int64_t>(*params.tokens, max_draws) : std::clamp<int64_t>(fit - before, 0, max_draws);
  trace.begin = prompt_tokens - std::max<int64_t>(prompt, drawn > 0 ? 1 : 0);
  trace.end = prompt_tokens - 1 + std::max<int64_t>(drawn, prompt > 0 ? 1 : 0);
  if (drawn == 0 && prompt == 0) trace.begin = trace.end = 0;
  const int64_t positions = trace.end - trace.begin;
  if (positions <= fit) return trace;
  return Bad(
      "", absl::StrCat(positions, " tokens of ", trace.layers.size(), " layers, ", config.mem_heads, " heads and ", trace.entries,
                       " entries are ", positions * of_token, " entries; at most ", max_entries, " are told (", fit, " tokens)"));
}

TokenTrace TraceOf(const StepResult& result, int64_t index, int64_t num_traced, const SequenceTrace& sequence,
                   const MemoryConfig& config) {
  TokenTrace trace;
  for (int32_t place : sequence.layers) {
    LayerTrace& layer = trace.layers.emplace_back();
    layer.layer = config.layers[place];
    for (int32_t head = 0; head < config.mem_heads; ++head) {
      const int64_t begin = ((place * num_traced + index) * config.mem_heads + head) * config.mem_knn;
      int32_t left = sequence.entries;
      for (int64_t i = begin; i < begin + config.mem_knn && left > 0; ++i) {
        if (result.trace_rows[i] < 0) continue;
        layer.heads.push_back(head);
        layer.rows.push_back(result.trace_rows[i]);
        layer.weights.push_back(result.trace_weights[i]);
        --left;
      }
    }
  }
  return trace;
}

}  // namespace memserve::engine
