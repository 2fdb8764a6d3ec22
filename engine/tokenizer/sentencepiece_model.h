// The SentencePiece library behind standard types only: its header declares names in namespace absl that clash with Abseil's own, so
// it is included in sentencepiece_model.cc and nowhere else.
#pragma once

#include <memory>
#include <string>
#include <vector>

namespace memserve::engine {

enum class PieceKind { kNormal, kByte, kUnknown, kSpecial };

class SentencePieceModel {
 public:
  // Null, and `error` says why, where the bytes are no model.
  static std::unique_ptr<SentencePieceModel> Parse(const std::string& serialized, std::string* error);
  ~SentencePieceModel();

  int size() const;
  std::string piece(int id) const;
  PieceKind kind(int id) const;
  int bos_id() const;  // -1: none
  int eos_id() const;  // -1: none
  // False, and `error` says why, on failure.
  bool Encode(const std::string& text, std::vector<int>* ids, std::string* error) const;

 private:
  struct Impl;
  SentencePieceModel();
  std::unique_ptr<Impl> impl_;
};

}  // namespace memserve::engine
