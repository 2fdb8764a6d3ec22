#include "engine/tokenizer/tokenizer.h"

#include <unistd.h>

#include <fstream>

#include "absl/strings/str_cat.h"

namespace memserve::engine {
namespace {

bool Exists(const std::string& path) { return access(path.c_str(), F_OK) == 0; }

// A rank file begins "IQ== 0"; a SentencePiece model with a tag of protobuf.
bool IsRankFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  char begin[64] = {};
  file.read(begin, sizeof(begin) - 1);
  const std::string_view line = std::string_view(begin).substr(0, std::string_view(begin).find('\n'));
  const size_t space = line.find(' ');
  if (space == std::string_view::npos || space == 0 || space % 4 != 0 || space + 1 == line.size()) return false;
  return line.substr(space + 1).find_first_not_of("0123456789\r") == std::string_view::npos;
}

// What config.json leaves open. tokenizer.json comes first: it has the tokens that were added since.
std::string KindByFiles(const std::string& folder) {
  if (Exists(absl::StrCat(folder, "/tokenizer.json"))) return "bpe";
  const std::string model = absl::StrCat(folder, "/tokenizer.model");
  if (!Exists(model)) return "none";
  return IsRankFile(model) ? "tiktoken" : "sentencepiece";
}

}  // namespace

std::string Tokenizer::Decode(const std::vector<int32_t>& ids, bool keep_special) const {
  Detokenizer detokenizer(*this, /*at_start=*/true, keep_special);
  std::string text;
  for (const int32_t id : ids) text += detokenizer.Append(id);
  return text + detokenizer.Finish();
}

std::string Detokenizer::Append(int32_t id) {
  if (tokenizer_.IsSpecial(id)) {
    // Bytes on both sides of a special token make no character: so the library has it. Hugging Face's decoders never see the token.
    std::string text = tokenizer_.name() == "sentencepiece" ? joiner_.Finish() : std::string();
    if (!keep_special_) return text;
    const std::string name = tokenizer_.SpecialName(id);
    first_ = first_ && name.empty();
    return text + joiner_.Append(name);
  }
  return joiner_.Append(first_ ? tokenizer_.FirstTokenBytes(id, &first_) : tokenizer_.TokenBytes(id));
}

absl::StatusOr<std::unique_ptr<Tokenizer>> LoadTokenizer(const std::string& folder, const std::string& kind, int vocab_size) {
  const std::string model = absl::StrCat(folder, "/tokenizer.model");
  const std::string chosen = kind.empty() ? KindByFiles(folder) : kind;
  absl::StatusOr<std::unique_ptr<Tokenizer>> loaded = nullptr;
  if (chosen == "bytes") {
    loaded = NewByteTokenizer();
  } else if (chosen == "sentencepiece") {
    loaded = LoadSentencePiece(model);
  } else if (chosen == "tiktoken") {
    loaded = LoadTiktoken(model);
  } else if (chosen == "bpe") {
    loaded = LoadBpe(absl::StrCat(folder, "/tokenizer.json"));
    // A Unigram model, say, that has its SentencePiece file beside it.
    if (absl::IsUnimplemented(loaded.status()) && kind.empty() && Exists(model) && !IsRankFile(model))
      loaded = LoadSentencePiece(model);
  }
  if (!loaded.ok() || *loaded == nullptr) return loaded;
  if ((*loaded)->vocab_size() > vocab_size) {
    return absl::InvalidArgumentError(absl::StrCat(folder, ": the tokenizer has ", (*loaded)->vocab_size(),
                                                   " tokens; config.json gives the model vocab_size ", vocab_size));
  }
  return loaded;
}

}  // namespace memserve::engine
