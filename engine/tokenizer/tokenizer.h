// Text to token ids and back. Implementations are immutable and may be used from several threads.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/tokenizer/utf8.h"

namespace memserve::engine {

// Bytes [begin, end) of a text.
struct TextSpan {
  size_t begin = 0;
  size_t end = 0;
  friend bool operator==(const TextSpan&, const TextSpan&) = default;
};

struct EncodeOptions {
  // The name of a special token gives this token. Else it is text like any other.
  bool allow_special = false;
  // Where it is text all the same: what users wrote, in a rendered chat. Ascending, apart.
  std::vector<TextSpan> literal;
};

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  virtual std::string_view name() const = 0;  // "sentencepiece", "bpe", "tiktoken", "bytes"
  virtual int vocab_size() const = 0;

  // Without begin- or end-of-sequence tokens.
  virtual absl::StatusOr<std::vector<int32_t>> Encode(const std::string& text, const EncodeOptions& options = {}) const = 0;

  // The bytes that a token stands for when text stands before it; a byte token gives its byte. Empty for special tokens and for ids
  // beyond the vocabulary (a model's output layer may be wider).
  virtual std::string TokenBytes(int32_t id) const = 0;
  // The same for a token before which no text stands: without the space that encoding puts in front of a text. `still_first`: the
  // next token is to be asked so too.
  virtual std::string FirstTokenBytes(int32_t id, bool* still_first) const {
    *still_first = false;
    return TokenBytes(id);
  }
  virtual bool IsSpecial(int32_t id) const = 0;
  virtual std::string SpecialName(int32_t id) const = 0;  // empty: the id is no special token
  virtual BrokenUtf8 broken_utf8() const { return BrokenUtf8::kEachPart; }

  virtual std::optional<int32_t> bos_id() const = 0;
  virtual std::optional<int32_t> eos_id() const = 0;
  // What ends a turn of a chat, where that is another token than eos_id.
  virtual std::optional<int32_t> end_of_turn_id() const { return std::nullopt; }
  // Whether a text is meant to begin with bos_id.
  virtual bool adds_bos() const { return bos_id().has_value(); }

  // Of a whole text, valid UTF-8. With keep_special, special tokens give their names.
  std::string Decode(const std::vector<int32_t>& ids, bool keep_special) const;
};

// Tokens to text, one by one: each increment is whole characters, and what was given never changes.
class Detokenizer {
 public:
  // at_start: no text stands before the first token.
  Detokenizer(const Tokenizer& tokenizer, bool at_start, bool keep_special)
      : tokenizer_(tokenizer), first_(at_start), keep_special_(keep_special), joiner_(tokenizer.broken_utf8()) {}
  std::string Append(int32_t id);
  std::string Finish() { return joiner_.Finish(); }

 private:
  const Tokenizer& tokenizer_;
  bool first_;
  const bool keep_special_;
  Utf8Joiner joiner_;
};

// id = byte, then begin and end of sequence: 256 and 257.
std::unique_ptr<Tokenizer> NewByteTokenizer();

// A SentencePiece model file.
absl::StatusOr<std::unique_ptr<Tokenizer>> LoadSentencePiece(const std::string& path);

// A byte-pair encoding as Hugging Face's `tokenizers` writes it (tokenizer.json), with tokenizer_config.json beside it.
absl::StatusOr<std::unique_ptr<Tokenizer>> LoadBpe(const std::string& path);

// A rank file, "base64 rank" a line, with Llama-3's pattern and special tokens.
absl::StatusOr<std::unique_ptr<Tokenizer>> LoadTiktoken(const std::string& path);

// What the folder has: `kind` as config.json gives it, or by the files where that is empty. Null for "none".
absl::StatusOr<std::unique_ptr<Tokenizer>> LoadTokenizer(const std::string& folder, const std::string& kind, int vocab_size);

}  // namespace memserve::engine
