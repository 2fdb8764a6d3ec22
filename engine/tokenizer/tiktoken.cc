#include <array>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "engine/model/json.h"
#include "engine/model/load_macros.h"
#include "engine/tokenizer/added_tokens.h"
#include "engine/tokenizer/byte_pair_merges.h"
#include "engine/tokenizer/regex.h"
#include "engine/tokenizer/tokenizer.h"

namespace memserve::engine {
namespace {

constexpr int64_t kMaxFileBytes = 64 << 20;
constexpr size_t kMaxTokenBytes = 1 << 10;
constexpr size_t kMaxJoinBytes = size_t{1} << 30;  // sum of squared lengths: what finding the pairs of all tokens costs
constexpr int32_t kSpecials = 256;
constexpr char kLlama3Pattern[] =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

// Debian's Abseil has a string_view of its own.
absl::string_view Key(std::string_view text) { return {text.data(), text.size()}; }

// Llama-3's names; the first of 256 stand for something, the others are held in reserve.
std::vector<std::string> SpecialNames() {
  std::vector<std::string> names = {"<|begin_of_text|>",
                                    "<|end_of_text|>",
                                    "<|reserved_special_token_0|>",
                                    "<|reserved_special_token_1|>",
                                    "<|reserved_special_token_2|>",
                                    "<|reserved_special_token_3|>",
                                    "<|start_header_id|>",
                                    "<|end_header_id|>",
                                    "<|reserved_special_token_4|>",
                                    "<|eot_id|>"};
  for (int i = 5; names.size() < kSpecials; ++i) names.push_back(absl::StrCat("<|reserved_special_token_", i, "|>"));
  return names;
}

class TiktokenTokenizer final : public Tokenizer {
 public:
  absl::Status Load(const std::string& path);

  std::string_view name() const override { return "tiktoken"; }
  int vocab_size() const override { return ranks() + kSpecials; }
  absl::StatusOr<std::vector<int32_t>> Encode(const std::string& text, const EncodeOptions& options) const override;
  std::string TokenBytes(int32_t id) const override { return id >= 0 && id < ranks() ? bytes_[id] : std::string(); }
  bool IsSpecial(int32_t id) const override { return id < 0 || id >= ranks(); }
  std::string SpecialName(int32_t id) const override {
    return id >= ranks() && id < vocab_size() ? special_names_[id - ranks()] : std::string();
  }
  std::optional<int32_t> bos_id() const override { return ranks(); }
  std::optional<int32_t> eos_id() const override { return ranks() + 1; }
  std::optional<int32_t> end_of_turn_id() const override { return ranks() + 9; }

 private:
  int32_t ranks() const { return static_cast<int32_t>(bytes_.size()); }
  absl::Status EncodePart(std::string_view text, std::vector<int32_t>& ids) const;

  std::vector<std::string> bytes_;  // by rank
  absl::flat_hash_map<std::string, int32_t> ids_;
  std::array<int32_t, 256> byte_ids_;
  BytePairMerges merges_;
  std::unique_ptr<Regex> pattern_;
  const std::vector<std::string> special_names_ = SpecialNames();
  AddedTokens specials_;
};

absl::Status TiktokenTokenizer::Load(const std::string& path) {
  LOAD_OR_RETURN(const std::string text, ReadFile(path, kMaxFileBytes));
  const auto wrong = [&](int64_t line, const auto&... what) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": line ", line, " ", what...));
  };
  int64_t line = 0;
  size_t join_bytes = 0;
  for (size_t at = 0; at < text.size();) {
    ++line;
    const size_t end = std::min(text.find('\n', at), text.size());
    std::string_view entry = std::string_view(text).substr(at, end - at);
    at = end + 1;
    if (entry.ends_with('\r')) entry.remove_suffix(1);
    if (entry.empty()) continue;
    const size_t space = entry.find(' ');
    std::string token;
    int64_t rank = 0;
    if (space == std::string_view::npos || !absl::Base64Unescape(Key(entry.substr(0, space)), &token) ||
        !absl::SimpleAtoi(Key(entry.substr(space + 1)), &rank)) {
      return wrong(line, "is not 'base64 rank'");
    }
    if (rank != ranks()) return wrong(line, "has rank ", rank, "; ranks go up from 0 one by one, so it must be ", ranks());
    if (token.empty() || token.size() > kMaxTokenBytes) {
      return wrong(line, "has a token of ", token.size(), " bytes; 1 to ", kMaxTokenBytes, " are accepted");
    }
    if (!ids_.emplace(token, ranks()).second) return wrong(line, "has the token of an earlier line");
    join_bytes += token.size() * token.size();
    bytes_.push_back(std::move(token));
  }
  if (bytes_.empty()) return absl::InvalidArgumentError(absl::StrCat(path, ": has no ranks"));
  if (join_bytes > kMaxJoinBytes) return absl::InvalidArgumentError(absl::StrCat(path, ": has too many long tokens"));
  for (int byte = 0; byte < 256; ++byte) {
    const auto it = ids_.find(std::string(1, static_cast<char>(byte)));
    if (it == ids_.end()) return absl::InvalidArgumentError(absl::StrCat(path, ": has no token for the byte ", byte));
    byte_ids_[byte] = it->second;
  }
  // A pair's rank is that of the token it makes.
  for (int32_t id = 0; id < ranks(); ++id) {
    const std::string_view token = bytes_[id];
    for (size_t i = 1; i < token.size(); ++i) {
      const auto left = ids_.find(Key(token.substr(0, i)));
      if (left == ids_.end()) continue;
      const auto right = ids_.find(Key(token.substr(i)));
      if (right != ids_.end()) merges_.Add(left->second, right->second, id, id);
    }
  }
  LOAD_OR_RETURN(pattern_, Regex::Compile(kLlama3Pattern));
  for (int32_t i = 0; i < kSpecials; ++i) {
    specials_.Add({.id = ranks() + i, .content = special_names_[i], .special = true}, special_names_[i]);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<int32_t>> TiktokenTokenizer::Encode(const std::string& text, const EncodeOptions& options) const {
  if (const size_t at = FindBrokenUtf8(text); at != std::string::npos) {
    return absl::InvalidArgumentError(absl::StrCat("text: is not UTF-8 at byte ", at));
  }
  std::vector<int32_t> ids;
  ids.reserve(text.size() / 3 + 4);
  const absl::Status status = specials_.Split(
      text, 0, options, [&](std::string_view part, size_t) { return EncodePart(part, ids); },
      [&](int32_t id) { ids.push_back(id); });
  if (!status.ok()) return status;
  return ids;
}

absl::Status TiktokenTokenizer::EncodePart(std::string_view text, std::vector<int32_t>& ids) const {
  std::vector<int32_t> symbols;
  return pattern_->ForEachMatch(text, [&](size_t begin, size_t end) {
    const std::string_view piece = text.substr(begin, end - begin);
    if (const auto it = ids_.find(Key(piece)); it != ids_.end()) {
      ids.push_back(it->second);
      return;
    }
    symbols.clear();
    for (const char c : piece) symbols.push_back(byte_ids_[static_cast<unsigned char>(c)]);
    merges_.Apply(symbols, ids);
  });
}

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> LoadTiktoken(const std::string& path) {
  auto tokenizer = std::make_unique<TiktokenTokenizer>();
  if (absl::Status s = tokenizer->Load(path); !s.ok()) return s;
  return tokenizer;
}

}  // namespace memserve::engine
