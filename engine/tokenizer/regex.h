// The patterns that split text before byte-pair encoding, through PCRE2: they need look-ahead and Unicode classes.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace memserve::engine {

// Immutable; may be used from several threads.
class Regex {
 public:
  // INVALID_ARGUMENT says where the pattern is wrong. Written as the Rust and Oniguruma patterns of tokenizers are.
  static absl::StatusOr<std::unique_ptr<Regex>> Compile(const std::string& pattern);
  ~Regex();

  // Matches from left to right, apart. `text` is valid UTF-8. INVALID_ARGUMENT where the pattern takes too long: patterns come with
  // checkpoints and may be hostile.
  absl::Status ForEachMatch(std::string_view text, absl::FunctionRef<void(size_t begin, size_t end)> on_match) const;

 private:
  explicit Regex(void* code) : code_(code) {}
  void* const code_;  // pcre2_code
};

// The pattern that matches `text` and nothing else.
std::string EscapeRegex(std::string_view text);

}  // namespace memserve::engine
