#include "engine/tokenizer/tokenizer.h"

#include <unistd.h>

#include "absl/strings/str_cat.h"

namespace memserve::engine {

absl::StatusOr<std::unique_ptr<Tokenizer>> LoadTokenizer(const std::string& folder, const std::string& kind, int vocab_size) {
  const std::string model = absl::StrCat(folder, "/tokenizer.model");
  const bool has_model = access(model.c_str(), F_OK) == 0;
  std::unique_ptr<Tokenizer> tokenizer;
  if (kind == "bytes") {
    tokenizer = NewByteTokenizer();
  } else if (kind == "sentencepiece" || (kind.empty() && has_model)) {
    absl::StatusOr<std::unique_ptr<Tokenizer>> loaded = LoadSentencePiece(model);
    if (!loaded.ok()) return loaded.status();
    tokenizer = *std::move(loaded);
  } else {
    return tokenizer;
  }
  if (tokenizer->vocab_size() > vocab_size) {
    return absl::InvalidArgumentError(absl::StrCat(folder, ": the tokenizer has ", tokenizer->vocab_size(),
                                                   " tokens; config.json gives the model vocab_size ", vocab_size));
  }
  return tokenizer;
}

}  // namespace memserve::engine
