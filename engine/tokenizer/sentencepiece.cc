#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "engine/model/json.h"
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
    for (int id = 0; id < model_->size(); ++id) bytes_.push_back(BytesOf(id));
    std::vector<int> ids;
    if (model_->Encode("a", &ids, &error) && !ids.empty()) adds_leading_space_ = bytes_[ids.front()].starts_with(" ");
    return absl::OkStatus();
  }

  std::string_view name() const override { return "sentencepiece"; }
  int vocab_size() const override { return model_->size(); }
  absl::StatusOr<std::vector<int32_t>> Encode(const std::string& text) const override {
    std::vector<int> ids;
    std::string error;
    if (!model_->Encode(text, &ids, &error)) return absl::InvalidArgumentError(absl::StrCat("text: ", error));
    return std::vector<int32_t>(ids.begin(), ids.end());
  }
  std::string TokenBytes(int32_t id) const override { return Known(id) ? bytes_[id] : std::string(); }
  bool IsSpecial(int32_t id) const override { return !Known(id) || model_->kind(id) == PieceKind::kSpecial; }
  std::string Decode(const std::vector<int32_t>& ids, bool keep_special) const override {
    std::string text;
    for (const int32_t id : ids) {
      if (!Known(id)) continue;
      if (IsSpecial(id)) {
        if (keep_special) text += model_->piece(id);
        continue;
      }
      const bool first = text.empty();
      text += bytes_[id];
      if (first && adds_leading_space_ && text.starts_with(" ")) text.erase(0, 1);
    }
    return text;
  }
  bool adds_leading_space() const override { return adds_leading_space_; }
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
  bool adds_leading_space_ = false;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> LoadSentencePiece(const std::string& path) {
  auto tokenizer = std::make_unique<SentencePieceTokenizer>();
  if (absl::Status s = tokenizer->Load(path); !s.ok()) return s;
  return tokenizer;
}

}  // namespace memserve::engine
