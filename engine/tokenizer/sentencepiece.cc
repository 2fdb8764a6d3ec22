#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "engine/model/json.h"
#include "engine/tokenizer/added_tokens.h"
#include "engine/tokenizer/sentencepiece_model.h"
#include "engine/tokenizer/tokenizer.h"

namespace memserve::engine {
namespace {

constexpr int64_t kMaxModelBytes = 64 << 20;
constexpr char kSpace[] = "\xe2\x96\x81";  // U+2581, which stands for a space inside pieces

class SentencePieceTokenizer final : public Tokenizer {
 public:
  absl::Status Load(const std::string& path) {
    absl::StatusOr<std::string> model = ReadFile(path, kMaxModelBytes);
    if (!model.ok()) return model.status();
    std::string error;
    model_ = SentencePieceModel::Parse(*model, &error);
    if (model_ == nullptr) return absl::InvalidArgumentError(absl::StrCat(path, ": is not a SentencePiece model: ", error));
    // One table, so that decoding needs no library call for each token.
    for (int id = 0; id < model_->size(); ++id) {
      bytes_.push_back(BytesOf(id));
      if (model_->kind(id) == PieceKind::kSpecial)
        specials_.Add({.id = id, .content = model_->piece(id), .special = true}, model_->piece(id));
    }
    std::vector<int> plain, spaced;
    if (!model_->Encode("a", &plain, &error) || !model_->Encode("  a", &spaced, &error) || plain.empty()) return absl::OkStatus();
    removes_spaces_ = plain == spaced;
    drops_space_ = removes_spaces_ || bytes_[plain.front()].starts_with(" ");
    return absl::OkStatus();
  }

  std::string_view name() const override { return "sentencepiece"; }
  int vocab_size() const override { return model_->size(); }
  // Between special tokens, each part is a text by itself.
  absl::StatusOr<std::vector<int32_t>> Encode(const std::string& text, const EncodeOptions& options) const override {
    std::vector<int32_t> ids;
    const auto on_text = [&](std::string_view part, size_t) -> absl::Status {
      std::vector<int> found;
      std::string error;
      if (!model_->Encode(std::string(part), &found, &error)) return absl::InvalidArgumentError(absl::StrCat("text: ", error));
      ids.insert(ids.end(), found.begin(), found.end());
      return absl::OkStatus();
    };
    if (absl::Status s = specials_.Split(text, 0, options, on_text, [&](int32_t id) { ids.push_back(id); }); !s.ok()) return s;
    return ids;
  }
  std::string TokenBytes(int32_t id) const override { return Known(id) ? bytes_[id] : std::string(); }
  std::string FirstTokenBytes(int32_t id, bool* still_first) const override {
    std::string bytes = TokenBytes(id);
    *still_first = false;
    if (!drops_space_ || !Known(id) || model_->kind(id) != PieceKind::kNormal) return bytes;
    const bool dropped = bytes.starts_with(' ');
    if (dropped) bytes.erase(0, 1);
    *still_first = bytes.empty() && (removes_spaces_ || !dropped);
    return bytes;
  }
  bool IsSpecial(int32_t id) const override { return !Known(id) || model_->kind(id) == PieceKind::kSpecial; }
  std::string SpecialName(int32_t id) const override { return Known(id) && IsSpecial(id) ? model_->piece(id) : std::string(); }
  BrokenUtf8 broken_utf8() const override { return BrokenUtf8::kEachByte; }
  std::optional<int32_t> bos_id() const override { return IdOrNone(model_->bos_id()); }
  std::optional<int32_t> eos_id() const override { return IdOrNone(model_->eos_id()); }

 private:
  bool Known(int32_t id) const { return id >= 0 && id < static_cast<int32_t>(bytes_.size()); }
  static std::optional<int32_t> IdOrNone(int id) { return id < 0 ? std::nullopt : std::optional<int32_t>(id); }

  std::string BytesOf(int id) const {
    switch (model_->kind(id)) {
      case PieceKind::kSpecial:
        return "";
      case PieceKind::kByte:  // "<0x0A>"
        return std::string(1, static_cast<char>(std::strtol(model_->piece(id).substr(3, 2).c_str(), nullptr, 16)));
      case PieceKind::kUnknown:
        return " \xe2\x81\x87 ";  // what the library gives
      case PieceKind::kNormal:
        return absl::StrReplaceAll(model_->piece(id), {{kSpace, " "}});
    }
    return "";
  }

  std::unique_ptr<SentencePieceModel> model_;
  std::vector<std::string> bytes_;
  AddedTokens specials_;
  bool removes_spaces_ = false;  // at the start of a text, all of them
  bool drops_space_ = false;     // one: the one that encoding puts there
};

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> LoadSentencePiece(const std::string& path) {
  auto tokenizer = std::make_unique<SentencePieceTokenizer>();
  if (absl::Status s = tokenizer->Load(path); !s.ok()) return s;
  return tokenizer;
}

}  // namespace memserve::engine
