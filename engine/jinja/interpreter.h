// Runs a template. Templates come with checkpoints and may be hostile, so everything is bounded: steps, bytes of text ever made,
// bytes of output, depth. The first error ends the run.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/jinja/syntax.h"
#include "engine/jinja/value.h"

namespace memserve::engine::jinja {

struct Limits {
  int64_t steps = 2'000'000;      // nodes walked, items and characters looked at in bulk count too
  int64_t text_bytes = 64 << 20;  // of all texts made on the way
  int64_t output_bytes = 16 << 20;
};

// What the template's raise_exception gave is INVALID_ARGUMENT, as all other errors are; the message gives the line.
absl::StatusOr<Text> Run(const Body& body, const Dict& variables, const Limits& limits);

}  // namespace memserve::engine::jinja
