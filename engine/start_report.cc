#include "engine/start_report.h"

#include <algorithm>
#include <fstream>
#include <map>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "engine/structured/grammar.h"
#include "spdlog/spdlog.h"

namespace memserve::engine {
namespace {

std::string FolderName(std::string folder) {
  while (folder.size() > 1 && folder.back() == '/') folder.pop_back();
  return folder.substr(folder.rfind('/') + 1);
}

}  // namespace

ModelInfo Describe(const EngineOptions& options, const CheckpointFolder& loaded, const StartPlan& plan, const Executor& executor) {
  const ModelConfig& config = loaded.model;
  ModelInfo info;
  info.name = options.model_name.empty() ? FolderName(options.checkpoint) : options.model_name;
  info.architecture = config.model_type;
  info.vocab_size = config.vocab_size;
  info.max_context_tokens = static_cast<int>(plan.executor.rank.max_context_tokens);
  info.dim = config.dim;
  info.n_layers = config.n_layers;
  info.n_heads = config.n_heads;
  info.n_kv_heads = config.n_kv_heads;
  for (const auto& [name, tensor] : loaded.tensors->tensors()) {
    if (name.find(".feed_forward.values") != std::string::npos) continue;
    int64_t parameters = 1;
    for (int64_t extent : tensor.shape) parameters *= extent;
    info.trunk_parameters += parameters;
  }
  if (!config.memory.layers.empty()) {
    info.memory_layers = config.memory.layers;
    info.memory_rows = config.memory.rows();
    info.mem_heads = config.memory.mem_heads;
    info.mem_knn = config.memory.mem_knn;
  }
  for (const auto& table : executor.first_rank().model().value_tables()) {
    ValueTableInfo held = {.name = table->tensor,
                           .layers = table->layers,
                           .rows = table->rows,
                           .dim = static_cast<int>(table->dim),
                           .format = kernels::NameOf(plan.executor.rank.types.table),
                           .placement = table->values->placement()};
    for (const auto& rank : executor.ranks()) {
      for (const auto& share : rank->model().value_tables()) {
        if (share->tensor != table->tensor) continue;
        held.bytes += share->values->bytes() + (share->values_u == nullptr ? 0 : share->values_u->bytes());
      }
    }
    info.value_tables.push_back(std::move(held));
  }
  info.eos_token_ids = loaded.generation.eos_token_ids;
  info.bos_token_id = loaded.generation.bos_token_id;
  if (loaded.tokenizer != nullptr) {
    if (info.eos_token_ids.empty() && loaded.tokenizer->eos_id()) info.eos_token_ids.push_back(*loaded.tokenizer->eos_id());
    if (!info.bos_token_id) info.bos_token_id = loaded.tokenizer->bos_id();
  }
  info.tokenizer = loaded.tokenizer == nullptr ? "none" : std::string(loaded.tokenizer->name());
  info.structured = loaded.tokenizer != nullptr && StructuredOutputIsBuilt();
  info.chat = loaded.chat_template.ok();
  info.backend = executor.first_rank().backend().name();
  info.isa = executor.first_rank().backend().isa();
  info.weight_dtype = kernels::NameOf(plan.executor.rank.types.weight);
  info.activation_dtype = kernels::NameOf(plan.executor.rank.types.activation);
  info.kv_dtype = kernels::NameOf(plan.executor.rank.kv_dtype);
  info.devices = plan.executor.ranks;
  return info;
}

void LogPlan(const StartPlan& plan) {
  spdlog::info(
      "plan: weights {}, value tables {} (held once), KV cache {} ({} pages of {} tokens), scratch {}, row counts {}: {} of {} "
      "available",
      FormatBytes(plan.Sum(&RankPlan::weight_bytes)), FormatBytes(plan.Sum(&RankPlan::table_bytes)),
      FormatBytes(plan.Sum(&RankPlan::kv_bytes)), plan.executor.rank.kv_pages, plan.executor.rank.kv_page_size,
      FormatBytes(plan.Sum(&RankPlan::scratch_bytes)), FormatBytes(plan.Sum(&RankPlan::count_bytes)), FormatBytes(plan.total()),
      FormatBytes(plan.available_bytes));
  const std::vector<std::string>& unused = plan.ranks.front().unused_tensors;
  if (unused.empty()) return;
  const size_t shown = std::min<size_t>(unused.size(), 5);
  spdlog::warn("{} tensors of the checkpoint are not part of the model and are left out: {}{}", unused.size(),
               absl::StrJoin(unused.begin(), unused.begin() + static_cast<int64_t>(shown), ", "),
               unused.size() > shown ? ", …" : "");
}

// Ranks may have read the same tensor, or parts of it.
void WarnOfNotFinite(const Executor& executor) {
  std::map<std::string, int64_t> found;
  for (const auto& rank : executor.ranks()) {
    for (const auto& [name, count] : rank->loaded().not_finite) found[name] = std::max(found[name], count);
  }
  if (found.empty()) return;
  int64_t values = 0;
  for (const auto& [name, count] : found) values += count;
  const auto& [name, count] = *found.begin();
  spdlog::warn("{}{} weights in {} tensors are NaN or infinite, {} of them in '{}': what the model says is not to be trusted",
               executor.ranks().size() > 1 ? "at least " : "", values, found.size(), count, name);
}

int64_t ResidentBytes(const std::string& field) {
  std::ifstream status("/proc/self/status");
  std::string key;
  for (std::string rest; status >> key && std::getline(status, rest);) {
    int64_t kib = 0;
    if (key == field + ":" && absl::SimpleAtoi(absl::StripSuffix(absl::StripAsciiWhitespace(rest), " kB"), &kib)) return kib * 1024;
  }
  return 0;
}

}  // namespace memserve::engine
