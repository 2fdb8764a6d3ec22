// What is asked of the value tables themselves: the values of rows, and how often rows were read.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "engine/model/config.h"

namespace memserve::engine {

inline constexpr size_t kMaxReadRows = 256;
inline constexpr int64_t kMaxReadValues = int64_t{1} << 19;  // floats of one answer: 2 MiB
inline constexpr int32_t kMaxTopRows = 1000;
inline constexpr size_t kMaxCountedRows = 1024;

struct ReadRowsRequest {
  std::optional<int32_t> layer;  // of the model, that reads the table; unset: the first with memory
  std::vector<int32_t> rows;     // 1 to 256, and at most 2^19 values together
};

// Exact: what the row's codes and scale stand for (a negative zero reads as zero).
struct TableRows {
  int64_t dim = 0;
  std::vector<float> values;   // [rows, dim]
  std::vector<float> experts;  // PEER: [rows, dim], the vectors u that a token is multiplied with
};

struct RowStatsRequest {
  std::optional<int32_t> layer;  // as above
  int32_t top = 10;              // [0, 1000]
  std::vector<int32_t> rows;     // at most 1024, whose counts are told
  bool reset = false;            // counting starts again at 0; no read is lost between the two
};

// Counts of a table since the start or the last reset. Each read of a row by a token that ran counts once, also when the token was
// computed again, or drafted and given up. A count stays at 2^32 - 1. While requests run, counts of different rows may be some
// steps apart.
struct RowStats {
  int64_t table_rows = 0;
  uint64_t reads = 0;         // of all rows
  int64_t distinct_rows = 0;  // that were read
  std::vector<std::pair<int32_t, uint32_t>>
      top;                       // row and count: the largest first, the lower row first among equals; none of count 0
  std::vector<uint32_t> counts;  // of the rows asked for, in their order
  absl::Duration since;
};

// INVALID_ARGUMENT names field, value and limit; UNIMPLEMENTED for a model without memory.
absl::Status Validate(const ReadRowsRequest& request, const ModelConfig& config);
absl::Status Validate(const RowStatsRequest& request, const ModelConfig& config);

// The table that the layer of a valid request reads, by its place among the model's tables.
int64_t TableOf(std::optional<int32_t> layer, const MemoryConfig& config);

// Goes through a table's counters a slice at a time, so that no step waits for long: a slice is a memory copy and one pass over 512
// KiB.
class RowStatsScan {
 public:
  static constexpr int64_t kSliceRows = int64_t{1} << 17;

  RowStatsScan(RowStatsRequest request, int64_t table_rows);

  int64_t next_row() const { return next_row_; }
  int64_t next_rows() const { return std::min(kSliceRows, stats_.table_rows - next_row_); }  // 0: done
  void Add(absl::Span<const uint32_t> counts);                                               // of the next rows
  RowStats Finish();

 private:
  void CutTop();

  const RowStatsRequest request_;
  RowStats stats_;      // its top is a list of candidates until the end
  uint32_t least_ = 0;  // that a row must have been read more than
  int64_t next_row_ = 0;
};

}  // namespace memserve::engine
