// When a request that was refused for want of room may be tried again: a payload of its status.
#pragma once

#include <algorithm>
#include <optional>

#include "absl/status/status.h"
#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"

namespace memserve::engine {

inline constexpr char kRetryAfterPayload[] = "memserve/retry_after_ms";
inline constexpr absl::Duration kLeastRetryAfter = absl::Milliseconds(50);
inline constexpr absl::Duration kMostRetryAfter = absl::Seconds(60);

// `wait` is what was measured, or 0 where nothing was yet.
inline void SetRetryAfter(absl::Duration wait, absl::Status* status) {
  const absl::Duration bounded = wait <= absl::ZeroDuration() ? absl::Seconds(1) : std::clamp(wait, kLeastRetryAfter, kMostRetryAfter);
  status->SetPayload(kRetryAfterPayload, absl::Cord(absl::StrCat(absl::ToInt64Milliseconds(bounded))));
}

inline std::optional<absl::Duration> RetryAfter(const absl::Status& status) {
  const absl::optional<absl::Cord> payload = status.GetPayload(kRetryAfterPayload);
  int64_t ms = 0;
  if (!payload || !absl::SimpleAtoi(std::string(*payload), &ms)) return std::nullopt;
  return absl::Milliseconds(ms);
}

}  // namespace memserve::engine
