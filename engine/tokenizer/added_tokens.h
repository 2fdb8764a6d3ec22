// Tokens that are found in a text by their names, before it is encoded: special ones where they are allowed, others always.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "engine/tokenizer/tokenizer.h"

namespace memserve::engine {

struct AddedToken {
  int32_t id = 0;
  std::string content;
  bool special = false;
  bool single_word = false;  // only where no letter or digit touches it
  bool lstrip = false;       // takes the white space before it along
  bool rstrip = false;       // and after it
  bool normalized = false;   // looked for after normalisation
};

// Leftmost and longest first, as Hugging Face's tokenizers find them.
class AddedTokens {
 public:
  // `content` is what is looked for; it may differ from token.content (normalised).
  void Add(const AddedToken& token, const std::string& content);
  bool empty() const { return tokens_.empty(); }

  // Calls on_text for what is none (never empty) and on_token for what is one, in the order of the text. `offset` is where `text`
  // begins in the whole of which options.literal speaks.
  absl::Status Split(std::string_view text, size_t offset, const EncodeOptions& options,
                     absl::FunctionRef<absl::Status(std::string_view part, size_t offset)> on_text,
                     absl::FunctionRef<void(int32_t id)> on_token) const;

 private:
  // Of the longest token at the front of `text`; -1: none.
  int Longest(std::string_view text, size_t* length) const;

  std::vector<AddedToken> tokens_;
  bool starts_[256] = {};
  absl::flat_hash_map<uint64_t, int32_t> edges_;  // node << 8 | byte → node
  std::vector<int> ends_ = {-1};                  // node → token that ends there
};

}  // namespace memserve::engine
