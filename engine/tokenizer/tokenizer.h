// Text to token ids and back. Implementations are immutable and may be used from several threads.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace memserve::engine {

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  virtual std::string_view name() const = 0;  // "sentencepiece", "bytes"
  virtual int vocab_size() const = 0;

  // Without begin- or end-of-sequence tokens.
  virtual absl::StatusOr<std::vector<int32_t>> Encode(const std::string& text) const = 0;

  // The bytes that a token stands for when text stands before it; a byte token gives its byte. Empty for special tokens and for ids
  // beyond the vocabulary (a model's output layer may be wider).
  virtual std::string TokenBytes(int32_t id) const = 0;
  virtual bool IsSpecial(int32_t id) const = 0;

  // Of a whole text. With keep_special, special tokens give their names. May hold bytes that are not UTF-8.
  virtual std::string Decode(const std::vector<int32_t>& ids, bool keep_special) const = 0;

  // Whether the first token of a text carries a space that the text does not have (SentencePiece's dummy prefix).
  virtual bool adds_leading_space() const { return false; }

  virtual std::optional<int32_t> bos_id() const = 0;
  virtual std::optional<int32_t> eos_id() const = 0;
};

// id = byte, then begin and end of sequence: 256 and 257.
std::unique_ptr<Tokenizer> NewByteTokenizer();

// A SentencePiece model file.
absl::StatusOr<std::unique_ptr<Tokenizer>> LoadSentencePiece(const std::string& path);

// What the folder has: `kind` as config.json gives it, or by the files where that is empty. Null for "none".
absl::StatusOr<std::unique_ptr<Tokenizer>> LoadTokenizer(const std::string& folder, const std::string& kind, int vocab_size);

}  // namespace memserve::engine
