#include "engine/table_queries.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace memserve::engine {
namespace {

absl::Status Bad(absl::string_view field, absl::string_view message) {
  return absl::InvalidArgumentError(absl::StrCat(field, ": ", message));
}

absl::Status CheckLayer(std::optional<int32_t> layer, const MemoryConfig& memory) {
  if (memory.layers.empty()) return absl::UnimplementedError("the model has no memory layers");
  if (!layer || std::find(memory.layers.begin(), memory.layers.end(), *layer) != memory.layers.end()) return absl::OkStatus();
  return Bad("layer", absl::StrCat(*layer, " has no memory; these do: ", absl::StrJoin(memory.layers, ", ")));
}

absl::Status CheckRows(const std::vector<int32_t>& rows, const MemoryConfig& memory) {
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i] >= 0 && rows[i] < memory.rows()) continue;
    return Bad("rows", absl::StrCat("row ", rows[i], " at index ", i, " is not in [0, ", memory.rows(), ")"));
  }
  return absl::OkStatus();
}

// Whether a goes before b.
bool ReadMore(const std::pair<int32_t, uint32_t>& a, const std::pair<int32_t, uint32_t>& b) {
  return a.second != b.second ? a.second > b.second : a.first < b.first;
}

}  // namespace

absl::Status Validate(const ReadRowsRequest& request, const ModelConfig& config) {
  if (absl::Status s = CheckLayer(request.layer, config.memory); !s.ok()) return s;
  const int64_t row_values = int64_t{config.value_dim()} * (config.memory.peer_variant ? 2 : 1);
  const auto most = std::max<int64_t>(1, std::min<int64_t>(kMaxReadRows, kMaxReadValues / row_values));
  if (request.rows.empty() || static_cast<int64_t>(request.rows.size()) > most) {
    return Bad("rows", absl::StrCat("has ", request.rows.size(), " rows; 1 to ", most, " are accepted"));
  }
  return CheckRows(request.rows, config.memory);
}

absl::Status Validate(const RowStatsRequest& request, const ModelConfig& config) {
  if (absl::Status s = CheckLayer(request.layer, config.memory); !s.ok()) return s;
  if (request.top < 0 || request.top > kMaxTopRows)
    return Bad("top", absl::StrCat(request.top, " is not in [0, ", kMaxTopRows, "]"));
  if (request.rows.size() > kMaxCountedRows) {
    return Bad("rows", absl::StrCat("has ", request.rows.size(), " rows; at most ", kMaxCountedRows, " are accepted"));
  }
  return CheckRows(request.rows, config.memory);
}

int64_t TableOf(std::optional<int32_t> layer, const MemoryConfig& config) {
  if (config.mem_share_values || !layer) return 0;
  return std::find(config.layers.begin(), config.layers.end(), *layer) - config.layers.begin();
}

RowStatsScan::RowStatsScan(RowStatsRequest request, int64_t table_rows) : request_(std::move(request)) {
  stats_.table_rows = table_rows;
  stats_.counts.resize(request_.rows.size());
}

// Candidates for the top are gathered and cut back now and then, which is cheaper than a heap where later rows are read more and
// more.
void RowStatsScan::Add(absl::Span<const uint32_t> counts) {
  constexpr size_t kCandidates = 8;  // times as many as are asked for
  for (size_t i = 0; i < counts.size(); ++i) {
    stats_.reads += counts[i];
    stats_.distinct_rows += counts[i] > 0 ? 1 : 0;
    if (counts[i] <= least_ || request_.top == 0) continue;  // later rows lose against equals
    stats_.top.emplace_back(static_cast<int32_t>(next_row_ + static_cast<int64_t>(i)), counts[i]);
    if (stats_.top.size() >= kCandidates * static_cast<size_t>(request_.top)) CutTop();
  }
  for (size_t i = 0; i < request_.rows.size(); ++i) {
    const int64_t at = request_.rows[i] - next_row_;
    if (at >= 0 && at < static_cast<int64_t>(counts.size())) stats_.counts[i] = counts[at];
  }
  next_row_ += static_cast<int64_t>(counts.size());
}

void RowStatsScan::CutTop() {
  const int64_t size = request_.top;
  if (static_cast<int64_t>(stats_.top.size()) < size || size == 0) return;
  std::nth_element(stats_.top.begin(), stats_.top.begin() + size - 1, stats_.top.end(), ReadMore);
  stats_.top.resize(size);
  least_ = stats_.top.back().second;
}

RowStats RowStatsScan::Finish() {
  CutTop();
  std::sort(stats_.top.begin(), stats_.top.end(), ReadMore);
  return std::move(stats_);
}

}  // namespace memserve::engine
