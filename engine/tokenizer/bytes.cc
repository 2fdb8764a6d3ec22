#include "engine/tokenizer/added_tokens.h"
#include "engine/tokenizer/tokenizer.h"

namespace memserve::engine {
namespace {

constexpr int32_t kBos = 256;
constexpr int32_t kEos = 257;

class ByteTokenizer final : public Tokenizer {
 public:
  ByteTokenizer() {
    for (const int32_t id : {kBos, kEos}) specials_.Add({.id = id, .content = SpecialName(id), .special = true}, SpecialName(id));
  }
  std::string_view name() const override { return "bytes"; }
  int vocab_size() const override { return kEos + 1; }
  absl::StatusOr<std::vector<int32_t>> Encode(const std::string& text, const EncodeOptions& options) const override {
    std::vector<int32_t> ids;
    const auto on_text = [&](std::string_view part, size_t) {
      for (const char c : part) ids.push_back(static_cast<unsigned char>(c));
      return absl::OkStatus();
    };
    if (absl::Status s = specials_.Split(text, 0, options, on_text, [&](int32_t id) { ids.push_back(id); }); !s.ok()) return s;
    return ids;
  }
  std::string TokenBytes(int32_t id) const override {
    return id >= 0 && id < 256 ? std::string(1, static_cast<char>(id)) : std::string();
  }
  bool IsSpecial(int32_t id) const override { return id < 0 || id >= 256; }
  std::string SpecialName(int32_t id) const override { return id == kBos ? "<s>" : id == kEos ? "</s>" : ""; }
  std::optional<int32_t> bos_id() const override { return kBos; }
  std::optional<int32_t> eos_id() const override { return kEos; }

 private:
  AddedTokens specials_;
};

}  // namespace

std::unique_ptr<Tokenizer> NewByteTokenizer() { return std::make_unique<ByteTokenizer>(); }

}  // namespace memserve::engine
