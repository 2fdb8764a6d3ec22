#include "absl/strings/str_cat.h"
#include "engine/tokenizer/tokenizer.h"

namespace memserve::engine {
namespace {

constexpr int32_t kBos = 256;
constexpr int32_t kEos = 257;

class ByteTokenizer final : public Tokenizer {
 public:
  std::string_view name() const override { return "bytes"; }
  int vocab_size() const override { return kEos + 1; }
  absl::StatusOr<std::vector<int32_t>> Encode(const std::string& text) const override {
    std::vector<int32_t> ids;
    for (const char c : text) ids.push_back(static_cast<unsigned char>(c));
    return ids;
  }
  std::string TokenBytes(int32_t id) const override {
    return id >= 0 && id < 256 ? std::string(1, static_cast<char>(id)) : std::string();
  }
  bool IsSpecial(int32_t id) const override { return id >= 256; }
  std::string Decode(const std::vector<int32_t>& ids, bool keep_special) const override {
    std::string text;
    for (const int32_t id : ids) {
      if (keep_special && id == kBos) absl::StrAppend(&text, "<s>");
      if (keep_special && id == kEos) absl::StrAppend(&text, "</s>");
      text += TokenBytes(id);
    }
    return text;
  }
  std::optional<int32_t> bos_id() const override { return kBos; }
  std::optional<int32_t> eos_id() const override { return kEos; }
};

}  // namespace

std::unique_ptr<Tokenizer> NewByteTokenizer() { return std::make_unique<ByteTokenizer>(); }

}  // namespace memserve::engine
