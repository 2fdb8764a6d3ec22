// Checkpoints that the engine does not read itself, turned into such as it does by the converter (clients/python, memserve-convert).
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace memserve::server {

// The folder to load for `checkpoint`: itself where it is one that the engine reads or nothing known at all (the engine then says what
// is missing), else its conversion in `cache`, made now if it is not there. A conversion belongs to the source's path, file sizes
// and times; one that was interrupted is taken up again; two servers do not convert the same source at once.
//
// FAILED_PRECONDITION: it must be converted, and `cache` is empty or the converter is not installed. INTERNAL: the converter failed;
// what it said went to standard error. Blocks while the converter runs.
absl::StatusOr<std::string> ConvertedCheckpoint(const std::string& checkpoint, const std::string& cache);

}  // namespace memserve::server
