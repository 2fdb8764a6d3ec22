#include "engine/start_plan.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <thread>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/model/load_macros.h"

namespace memserve::engine {
namespace {

using kernels::DType;

constexpr int64_t kDefaultContexts = 16;  // full contexts that the default KV cache holds

absl::StatusOr<DType> ParseType(const char* option, const std::string& text, DType fallback) {
  if (text == "auto") return fallback;
  if (text == "f32") return DType::kF32;
  if (text == "bf16") return DType::kBF16;
  return absl::InvalidArgumentError(absl::StrCat(option, ": '", text, "' is not one of auto, f32, bf16"));
}

absl::StatusOr<DType> ParseTableType(const std::string& text, DType fallback) {
  if (text == "int8") return DType::kI8;
  if (text == "int4") return DType::kI4;
  absl::StatusOr<DType> type = ParseType("table_dtype", text, fallback);
  if (type.ok()) return type;
  return absl::InvalidArgumentError(absl::StrCat(type.status().message(), ", int8, int4"));
}

absl::StatusOr<DType> ParseKvType(const std::string& text, DType fallback) {
  if (text == "int8") return DType::kI8;
  absl::StatusOr<DType> type = ParseType("kv_dtype", text, fallback);
  if (type.ok()) return type;
  return absl::InvalidArgumentError(absl::StrCat(type.status().message(), ", int8"));
}

// As the checkpoint holds the trunk; f16 becomes f32, which holds it exactly.
DType StoredWeightType(const ModelConfig& config, const Checkpoint& checkpoint) {
  const TensorInfo* tensor = checkpoint.Find(config.names.Stored("layers.0.attention.wq.weight"));
  return tensor != nullptr && tensor->dtype == DType::kBF16 ? DType::kBF16 : DType::kF32;
}

DType StoredTableType(const ModelConfig& config, const Checkpoint& checkpoint, DType fallback) {
  for (int layer : config.memory.layers) {
    for (const char* part : {"values", "values_u"}) {
      const TensorInfo* tensor = checkpoint.Find(absl::StrCat("layers.", layer, ".feed_forward.", part, ".weight"));
      if (tensor == nullptr) continue;
      if (tensor->dtype == DType::kU8) return DType::kI4;
      if (tensor->dtype == DType::kF16) return DType::kF32;  // exact
      return kernels::IsRowFormat(tensor->dtype) ? tensor->dtype : fallback;
    }
  }
  return fallback;
}

absl::StatusOr<RankOptions> ResolveTypes(const EngineOptions& options, const ModelConfig& config, const Checkpoint& checkpoint) {
  RankOptions rank;
  const DType stored = StoredWeightType(config, checkpoint);
  LOAD_OR_RETURN(rank.types.weight, ParseType("weight_dtype", options.weight_dtype, stored));
  LOAD_OR_RETURN(rank.types.activation, ParseType("activation_dtype", options.activation_dtype, rank.types.weight));
  LOAD_OR_RETURN(rank.types.table, ParseTableType(options.table_dtype, StoredTableType(config, checkpoint, rank.types.weight)));
  LOAD_OR_RETURN(rank.kv_dtype, ParseKvType(options.kv_dtype, rank.types.activation));
  if (rank.types.activation == DType::kBF16 && rank.types.weight == DType::kF32) {
    return absl::InvalidArgumentError("activation_dtype: bf16 needs weight_dtype bf16");
  }
  return rank;
}

absl::Status CheckRange(const char* option, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(option, ": ", value, " is not in [", low, ", ", high, "]"));
}

absl::Status CheckOptions(const EngineOptions& o, const ModelConfig& config) {
  const int64_t bytes = int64_t{1} << 50;
  for (const absl::Status& status : {
           CheckRange("max_batch_tokens", o.max_batch_tokens, 1, 1 << 20),
           CheckRange("max_sequences", o.max_sequences, 1, 1 << 16),
           CheckRange("max_waiting", o.max_waiting, 0, 1 << 20),
           CheckRange("max_waiting_tokens", o.max_waiting_tokens, 0, int64_t{1} << 40),
           CheckRange("max_context_tokens", o.max_context_tokens, 0, config.max_seqlen),
           CheckRange("kv_page_size", o.kv_page_size, kernels::kAttentionBlock, 1024),
           CheckRange("kv_cache_bytes", o.kv_cache_bytes, 0, bytes),
           CheckRange("threads", o.threads, 0, 4096),
           CheckRange("step_depth", o.step_depth, 0, 2),
           CheckRange("tokenizer_threads", o.tokenizer_threads, 1, 256),
           CheckRange("max_trace_entries", o.max_trace_entries, 0, 1 << 24),
           CheckRange("loader_threads", o.loader_threads, 0, 256),
           CheckRange("max_prompt_bytes", o.max_prompt_bytes, 1, bytes),
           CheckRange("grammar_timeout_ms", o.grammar_timeout_ms, 1, 600'000),
           CheckRange("grammar_mask_timeout_ms", o.grammar_mask_timeout_ms, 1, 600'000),
           CheckRange("grammar_memory_bytes", o.grammar_memory_bytes, 64 << 20, bytes),
           CheckRange("grammar_cache_bytes", o.grammar_cache_bytes, 0, bytes),
           CheckRange("devices", static_cast<int64_t>(o.devices.size()), 1, std::min(64, config.n_heads)),
       }) {
    if (!status.ok()) return status;
  }
  if (!(o.kv_cache_fraction >= 0 && o.kv_cache_fraction <= 1)) {
    return absl::InvalidArgumentError(absl::StrCat("kv_cache_fraction: ", o.kv_cache_fraction, " is not in [0, 1]"));
  }
  if (o.kv_cache_fraction > 0 && o.kv_cache_bytes > 0) {
    return absl::InvalidArgumentError("kv_cache_fraction: kv_cache_bytes says how much; give one of them");
  }
  if (o.kv_page_size % kernels::kAttentionBlock != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("kv_page_size: ", o.kv_page_size, " is not a multiple of ", kernels::kAttentionBlock));
  }
  if (o.backend != "cpu" && o.backend != "reference") {
    return absl::InvalidArgumentError(absl::StrCat("backend: '", o.backend, "' is not one of cpu, reference"));
  }
  std::vector<int> devices = o.devices;
  std::sort(devices.begin(), devices.end());
  if (devices.front() < 0 || std::adjacent_find(devices.begin(), devices.end()) != devices.end()) {
    return absl::InvalidArgumentError("devices: each must be a different number from 0 on");
  }
  return absl::OkStatus();
}

absl::Status PlanRanks(const ModelConfig& config, const Checkpoint& checkpoint, StartPlan& plan) {
  plan.ranks.clear();
  for (int r = 0; r < plan.executor.ranks; ++r) {
    absl::StatusOr<RankPlan> rank = Rank::Plan(config, {.rank = r, .ranks = plan.executor.ranks}, checkpoint, plan.executor.rank);
    if (!rank.ok()) return rank.status();
    plan.ranks.push_back(*std::move(rank));
  }
  return absl::OkStatus();
}

// How many pages, given what a page takes on all ranks together.
absl::StatusOr<int64_t> ResolveKvPages(const EngineOptions& options, const StartPlan& plan) {
  const int64_t page_bytes = plan.Sum(&RankPlan::kv_bytes_per_page);
  const int64_t per_context = plan.executor.rank.pages_per_sequence();
  if (options.kv_cache_fraction > 0) {
    const double free =
        static_cast<double>(std::max<int64_t>(0, plan.available_bytes - (plan.total() - plan.Sum(&RankPlan::kv_bytes))));
    const auto pages = static_cast<int64_t>(options.kv_cache_fraction * free / static_cast<double>(page_bytes));
    // An int32 names a page.
    if (pages >= 1) return std::min<int64_t>(pages, INT32_MAX);
    return absl::InvalidArgumentError(
        absl::StrCat("kv_cache_fraction: ", options.kv_cache_fraction, " of the ", FormatBytes(static_cast<int64_t>(free)),
                     " that are free beside the rest is less than one page, ", FormatBytes(page_bytes)));
  }
  if (options.kv_cache_bytes == 0) {
    return std::max<int64_t>(per_context, std::min(kDefaultContexts * per_context, plan.available_bytes / 4 / page_bytes));
  }
  const int64_t pages = options.kv_cache_bytes / page_bytes;
  if (pages < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("kv_cache_bytes: ", options.kv_cache_bytes, " is less than one page, ", page_bytes));
  }
  return pages;
}

std::string Parts(const StartPlan& plan) {
  return absl::StrCat("weights ", FormatBytes(plan.Sum(&RankPlan::weight_bytes)), ", value tables ",
                      FormatBytes(plan.Sum(&RankPlan::table_bytes)), ", KV cache ", FormatBytes(plan.Sum(&RankPlan::kv_bytes)),
                      ", scratch ", FormatBytes(plan.Sum(&RankPlan::scratch_bytes)), ", row counts ",
                      FormatBytes(plan.Sum(&RankPlan::count_bytes)));
}

// "…; --kv_cache_bytes=N would fit", where something would.
absl::Status DoesNotFit(const StartPlan& plan) {
  const int64_t without_kv = plan.total() - plan.Sum(&RankPlan::kv_bytes);
  const int64_t left = plan.available_bytes - without_kv;
  const int64_t one_context = plan.Sum(&RankPlan::kv_bytes_per_page) * plan.executor.rank.pages_per_sequence();
  const std::string advice = left >= one_context ? absl::StrCat("--kv_cache_bytes=", left, " would fit")
                                                 : absl::StrCat("it needs ", FormatBytes(without_kv + one_context), " at least");
  return absl::ResourceExhaustedError(absl::StrCat("the plan needs ", FormatBytes(plan.total()), " (", Parts(plan), "); ",
                                                   FormatBytes(plan.available_bytes), " are available; ", advice));
}

// The number in a one-line file, or -1.
int64_t ReadNumber(const std::string& path) {
  std::ifstream file(path);
  std::string word;
  int64_t value = -1;
  return file >> word && absl::SimpleAtoi(word, &value) ? value : -1;
}

}  // namespace

int64_t StartPlan::Sum(int64_t RankPlan::*part) const {
  int64_t sum = 0;
  for (const RankPlan& rank : ranks) sum += rank.*part;
  return sum;
}

int64_t StartPlan::total() const {
  int64_t sum = 0;
  for (const RankPlan& rank : ranks) sum += rank.total();
  return sum;
}

std::string FormatBytes(int64_t bytes) {
  const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < std::size(units)) {
    value /= 1024;
    ++unit;
  }
  return unit == 0 ? absl::StrCat(bytes, " B") : absl::StrFormat("%.*f %s", value < 10 ? 2 : 1, value, units[unit]);
}

int64_t AvailableMemory() {
  int64_t available = INT64_MAX;
  std::ifstream meminfo("/proc/meminfo");
  std::string key, rest;
  int64_t kib = 0;
  while (meminfo >> key >> kib && std::getline(meminfo, rest)) {
    if (key == "MemAvailable:") available = kib * 1024;
  }
  const int64_t limit = ReadNumber("/sys/fs/cgroup/memory.max");
  const int64_t used = ReadNumber("/sys/fs/cgroup/memory.current");
  if (limit > 0 && used >= 0) available = std::min(available, std::max<int64_t>(0, limit - used));
  return available;
}

absl::StatusOr<StartPlan> MakeStartPlan(const EngineOptions& options, const ModelConfig& config, const Checkpoint& checkpoint) {
  if (absl::Status s = CheckOptions(options, config); !s.ok()) return s;
  StartPlan plan;
  const int cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  plan.executor.backend = options.backend;
  plan.executor.ranks = static_cast<int>(options.devices.size());
  plan.executor.threads = options.threads > 0 ? options.threads : cores;
  plan.executor.isa = options.isa;
  LOAD_OR_RETURN(plan.executor.rank, ResolveTypes(options, config, checkpoint));
  RankOptions& rank = plan.executor.rank;
  rank.kv_page_size = options.kv_page_size;
  rank.max_context_tokens = options.max_context_tokens > 0 ? options.max_context_tokens : config.max_seqlen;
  rank.max_tokens = options.max_batch_tokens;
  rank.max_sequences = std::min(options.max_sequences, options.max_batch_tokens);
  rank.count_rows = options.count_rows;
  rank.loader_threads = options.loader_threads > 0 ? options.loader_threads : std::min(8, cores);
  plan.available_bytes = options.memory_limit_bytes > 0 ? options.memory_limit_bytes : AvailableMemory();

  if (absl::Status s = PlanRanks(config, checkpoint, plan); !s.ok()) return s;
  LOAD_OR_RETURN(rank.kv_pages, ResolveKvPages(options, plan));
  for (RankPlan& planned : plan.ranks) planned.kv_bytes = planned.kv_bytes_per_page * rank.kv_pages;
  if (plan.total() > plan.available_bytes) return DoesNotFit(plan);
  return plan;
}

}  // namespace memserve::engine
