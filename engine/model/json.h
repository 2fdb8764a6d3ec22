// Reading JSON files that may be wrong or hostile.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace memserve::engine {

// The whole file, at most `max_bytes`. NOT_FOUND, INVALID_ARGUMENT (too large), DATA_LOSS (read error).
absl::StatusOr<std::string> ReadFile(const std::string& path, int64_t max_bytes);

// An object without duplicate keys, at most 32 levels deep. INVALID_ARGUMENT names `where` and the place.
absl::StatusOr<nlohmann::json> ParseJsonObject(const std::string& text, const std::string& where);

}  // namespace memserve::engine
