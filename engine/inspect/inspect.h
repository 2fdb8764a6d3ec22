// What memserve-inspect says of a checkpoint: all that is known without reading a weight, and how it would be held.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "engine/options.h"
#include "nlohmann/json.hpp"

namespace memserve::engine {

// `options` as for an engine: checkpoint, devices, types, memory limit. With `checksums` the SHA-256 of every file, held against the
// folder's SHA256SUMS where it has one. Errors are those of loading; that the model does not fit is no error.
absl::StatusOr<nlohmann::ordered_json> Inspect(const EngineOptions& options, bool checksums);

// The same as a table for people.
std::string FormatInspection(const nlohmann::ordered_json& inspection);

}  // namespace memserve::engine
