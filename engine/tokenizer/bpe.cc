#include <sys/stat.h>

#include <array>
#include <cctype>
#include <deque>
#include <optional>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "engine/model/json.h"
#include "engine/model/load_macros.h"
#include "engine/tokenizer/added_tokens.h"
#include "engine/tokenizer/byte_pair_merges.h"
#include "engine/tokenizer/normalizer.h"
#include "engine/tokenizer/pre_tokenizer.h"
#include "engine/tokenizer/tokenizer.h"
#include "engine/tokenizer/tokenizer_json.h"

namespace memserve::engine {
namespace {

using nlohmann::json;

constexpr int64_t kMaxFileBytes = 256 << 20;
constexpr int64_t kMaxConfigBytes = 8 << 20;
constexpr int64_t kMaxIds = 1 << 24;
constexpr size_t kMaxAddedTokens = 1 << 17;
constexpr size_t kMaxAddedBytes = 1 << 10;

// GPT-2 writes bytes as characters: printable ones as themselves, the others from U+0100 on.
struct ByteAlphabet {
  ByteAlphabet() {
    for (auto& byte : byte_of) byte = -1;
    int extra = 0;
    for (int byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
      byte_of[printable ? byte : 0x100 + extra++] = static_cast<int16_t>(byte);
    }
  }
  std::array<int16_t, 0x144> byte_of;
};

// The bytes that a token of this alphabet stands for; nothing where it has a character that is not in it.
std::optional<std::string> FromByteAlphabet(std::string_view token) {
  static const ByteAlphabet* const alphabet = new ByteAlphabet;
  std::string bytes;
  for (size_t at = 0; at < token.size();) {
    const auto lead = static_cast<unsigned char>(token[at]);
    const size_t size = CharacterBytes(token.substr(at));
    if (size > 2 || at + size > token.size()) return std::nullopt;
    const int character = size == 1 ? lead : (lead & 0x1f) << 6 | (static_cast<unsigned char>(token[at + 1]) & 0x3f);
    if (character >= static_cast<int>(alphabet->byte_of.size()) || alphabet->byte_of[character] < 0) return std::nullopt;
    bytes += static_cast<char>(alphabet->byte_of[character]);
    at += size;
  }
  return bytes;
}

// "<0x0A>" → 10
std::optional<int> ByteToken(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return std::nullopt;
  int byte = 0;
  for (const char c : token.substr(3, 2)) {
    if (!std::isxdigit(static_cast<unsigned char>(c))) return std::nullopt;
    byte = byte * 16 + (c <= '9' ? c - '0' : (c | 0x20) - 'a' + 10);
  }
  return byte;
}

// Debian's Abseil has a string_view of its own.
absl::string_view Key(std::string_view text) { return {text.data(), text.size()}; }

absl::Status Wrong(absl::string_view what) { return absl::InvalidArgumentError(what); }

// How tokens become text: the steps under "decoder".
struct Decoder {
  bool byte_level = false;
  bool byte_fallback = false;
  std::vector<std::pair<std::string, std::string>> replacements;
  enum class Start { kKept, kSpaceDropped, kMetaspacesDropped } start = Start::kKept;

  absl::Status Add(const json& description, int depth) {
    JsonFields fields(description, "decoder");
    const std::string type = fields.String("type");
    if (!fields.status().ok()) return fields.status();
    if (type == "Sequence") {
      if (depth > 4) return Wrong("decoder: is nested too deep");
      for (const json& part : fields.Array("decoders")) {
        if (absl::Status s = Add(part, depth + 1); !s.ok()) return s;
      }
    } else if (type == "ByteLevel") {
      byte_level = true;
    } else if (type == "ByteFallback") {
      byte_fallback = true;
    } else if (type == "Replace") {
      const TextPattern pattern = fields.Pattern("pattern");
      const std::string content = fields.String("content");
      if (!fields.status().ok()) return fields.status();
      if (pattern.is_regex || pattern.text.empty() || replacements.size() >= 16) {
        return absl::UnimplementedError("decoder: Replace with a Regex, or more than 16 of them; known is one text for another");
      }
      replacements.emplace_back(pattern.text, content);
    } else if (type == "Strip") {
      const std::string content = fields.String("content");
      const int64_t first = fields.Int("start", 0, INT32_MAX);
      const int64_t last = fields.Int("stop", 0, INT32_MAX);
      if (!fields.status().ok()) return fields.status();
      if (content != " " || first > 1 || last > 0) {
        return absl::UnimplementedError("decoder: Strip of other than one space at the start of a text");
      }
      if (first == 1) start = Start::kSpaceDropped;
    } else if (type == "Metaspace") {
      const bool adds = fields.Bool("add_prefix_space", true);
      const std::string scheme = fields.OptionalString("prepend_scheme", adds ? "always" : "never");
      if (fields.String("replacement") != kMetaspace)
        return absl::UnimplementedError("decoder: Metaspace's replacement is not U+2581");
      replacements.emplace_back(kMetaspace, " ");
      if (scheme != "never") start = Start::kMetaspacesDropped;
    } else if (type != "Fuse") {
      return absl::UnimplementedError(
          absl::StrCat("decoder: type is '", type.substr(0, 100),
                       "'; known are ByteLevel, ByteFallback, Fuse, Metaspace, Replace, Strip, Sequence"));
    }
    return fields.status();
  }

  std::string Bytes(const std::string& token) const {
    std::string text = token;
    for (const auto& [from, to] : replacements) text = absl::StrReplaceAll(text, {{from, to}});
    if (byte_fallback) {
      if (const std::optional<int> byte = ByteToken(text)) return std::string(1, static_cast<char>(*byte));
    }
    if (byte_level) return FromByteAlphabet(text).value_or(text);
    return text;
  }
};

class BpeTokenizer final : public Tokenizer {
 public:
  // Messages say what is wrong inside the file; the caller puts its name in front. `config` is tokenizer_config.json, or null.
  absl::Status Load(const std::string& text, const json& config);

  std::string_view name() const override { return "bpe"; }
  int vocab_size() const override { return static_cast<int>(bytes_.size()); }
  absl::StatusOr<std::vector<int32_t>> Encode(const std::string& text, const EncodeOptions& options) const override;
  std::string TokenBytes(int32_t id) const override { return Known(id) && !special_.contains(id) ? bytes_[id] : std::string(); }
  std::string FirstTokenBytes(int32_t id, bool* still_first) const override;
  bool IsSpecial(int32_t id) const override { return !Known(id) || special_.contains(id); }
  std::string SpecialName(int32_t id) const override {
    const auto it = special_.find(id);
    return it == special_.end() ? std::string() : it->second;
  }
  BrokenUtf8 broken_utf8() const override { return decoder_.byte_fallback ? BrokenUtf8::kEachByte : BrokenUtf8::kEachPart; }
  std::optional<int32_t> bos_id() const override { return bos_; }
  std::optional<int32_t> eos_id() const override { return eos_; }
  std::optional<int32_t> end_of_turn_id() const override { return end_of_turn_; }
  bool adds_bos() const override { return adds_bos_; }

 private:
  bool Known(int32_t id) const { return id >= 0 && id < static_cast<int32_t>(bytes_.size()); }
  std::optional<int32_t> Find(const std::string& token) const {
    const auto it = ids_.find(token);
    return it == ids_.end() ? std::nullopt : std::optional<int32_t>(it->second);
  }
  absl::Status LoadVocabulary(TokenizerJson& file);
  absl::Status LoadAddedTokens(const json& list);
  absl::Status LoadPostProcessor(const json& description, int depth);
  void ChooseEnds(const json& config);
  absl::Status EncodePart(std::string_view text, bool starts_text, std::vector<int32_t>& ids) const;
  void EncodePiece(std::string_view piece, std::vector<int32_t>& symbols, std::vector<int32_t>& ids) const;
  void AddCharacters(std::string_view piece, std::vector<int32_t>& symbols) const;

  Normalizer normalizer_;
  PreTokenizer pre_tokenizer_;
  Decoder decoder_;
  AddedTokens added_;             // looked for in the text as it is
  AddedTokens added_normalized_;  // and after normalisation
  BytePairMerges merges_;
  absl::flat_hash_map<std::string, int32_t> ids_;         // by token, as the file writes it
  absl::flat_hash_map<std::string, int32_t> pieces_;      // by what it encodes: bytes at byte level, else as ids_
  std::array<int32_t, 256> byte_ids_;                     // at byte level: of one byte; with byte_fallback: of "<0x00>"; -1: none
  absl::flat_hash_map<std::string, int32_t> characters_;  // else: of one character
  bool byte_fallback_ = false;
  bool fuse_unknown_ = false;
  bool ignore_merges_ = false;
  std::optional<int32_t> unknown_;
  std::vector<std::string> bytes_;  // by id: what it decodes to
  absl::flat_hash_map<int32_t, std::string> special_;
  std::optional<int32_t> bos_;
  std::optional<int32_t> eos_;
  std::optional<int32_t> template_eos_;
  std::optional<int32_t> end_of_turn_;
  bool adds_bos_ = false;
};

absl::Status BpeTokenizer::Load(const std::string& text, const json& config) {
  LOAD_OR_RETURN(TokenizerJson file, ParseTokenizerJson(text));
  JsonFields root(file.rest, "the file");
  LOAD_OR_RETURN(normalizer_, Normalizer::Parse(root.Value("normalizer")));
  LOAD_OR_RETURN(pre_tokenizer_, PreTokenizer::Parse(root.Value("pre_tokenizer")));
  if (absl::Status s = decoder_.Add(root.Value("decoder"), 0); !s.ok()) return s;
  if (absl::Status s = LoadVocabulary(file); !s.ok()) return s;
  if (const json& added = root.Value("added_tokens"); !added.is_null()) {
    if (absl::Status s = LoadAddedTokens(added); !s.ok()) return s;
  }
  if (absl::Status s = LoadPostProcessor(root.Value("post_processor"), 0); !s.ok()) return s;
  ChooseEnds(config);
  return root.status();
}

absl::Status BpeTokenizer::LoadVocabulary(TokenizerJson& file) {
  const auto model_it = file.rest.find("model");
  if (model_it == file.rest.end()) return Wrong("model is missing");
  JsonFields model(*model_it, "model");
  // Old files have no type; what they hold is told by their merges.
  const std::string type = model.OptionalString("type", "BPE");
  if (!model.status().ok()) return model.status();
  if (type != "BPE") return absl::UnimplementedError(absl::StrCat("model: type is '", type.substr(0, 100), "'; known is BPE"));
  if (!model.OptionalString("continuing_subword_prefix", "").empty() || !model.OptionalString("end_of_word_suffix", "").empty()) {
    return absl::UnimplementedError("model: continuing_subword_prefix or end_of_word_suffix is set; neither is known");
  }
  if (const json& dropout = model.Value("dropout"); dropout.is_number() && dropout != 0) {
    return absl::UnimplementedError("model: dropout is set; encoding would be left to chance");
  }
  byte_fallback_ = model.Bool("byte_fallback", false);
  fuse_unknown_ = model.Bool("fuse_unk", false);
  ignore_merges_ = model.Bool("ignore_merges", false);
  if (file.vocab.empty()) return Wrong("model.vocab has no tokens");

  ids_.reserve(file.vocab.size());
  int64_t most = 0;
  for (auto& [token, id] : file.vocab) {
    if (id >= kMaxIds)
      return Wrong(
          absl::StrCat("model.vocab gives '", token.substr(0, 100), "' the id ", id, "; at most ", kMaxIds - 1, " is accepted"));
    most = std::max(most, id);
    if (!ids_.emplace(token, static_cast<int32_t>(id)).second)
      return Wrong(absl::StrCat("model.vocab has '", token.substr(0, 100), "' twice"));
  }
  // Ids without a token are holes of the vocabulary; far more holes than tokens is a file that only claims to be large.
  if (most > 16 * static_cast<int64_t>(file.vocab.size()) + 65536) {
    return Wrong(absl::StrCat("model.vocab has ", file.vocab.size(), " tokens and an id of ", most));
  }
  bytes_.resize(static_cast<size_t>(most) + 1);
  std::vector<bool> taken(bytes_.size());
  byte_ids_.fill(-1);
  pieces_.reserve(ids_.size());
  for (const auto& [token, id] : file.vocab) {
    if (taken[id]) return Wrong(absl::StrCat("model.vocab gives the id ", id, " twice, once to '", token.substr(0, 100), "'"));
    taken[id] = true;
    bytes_[id] = decoder_.Bytes(token);
    if (pre_tokenizer_.byte_level()) {
      const std::optional<std::string> piece = FromByteAlphabet(token);
      if (!piece) continue;  // a name that no text encodes to
      pieces_.emplace(*piece, static_cast<int32_t>(id));
      if (piece->size() == 1) byte_ids_[static_cast<unsigned char>((*piece)[0])] = static_cast<int32_t>(id);
    } else {
      if (ignore_merges_) pieces_.emplace(token, static_cast<int32_t>(id));
      if (!token.empty() && CharacterBytes(token) == token.size()) characters_.emplace(token, static_cast<int32_t>(id));
      if (const std::optional<int> byte = ByteToken(token); byte && byte_fallback_) byte_ids_[*byte] = static_cast<int32_t>(id);
    }
  }
  if (const std::string unknown = model.OptionalString("unk_token", ""); !unknown.empty()) {
    unknown_ = Find(unknown);
    if (!unknown_) return Wrong(absl::StrCat("model.unk_token is '", unknown.substr(0, 100), "', which model.vocab lacks"));
  }
  if (file.merges.size() > INT32_MAX) return Wrong("model.merges is too long");
  merges_.Reserve(file.merges.size());
  std::string joined;
  for (size_t rank = 0; rank < file.merges.size(); ++rank) {
    const auto& [left, right] = file.merges[rank];
    joined = left;
    joined += right;
    const std::optional<int32_t> left_id = Find(left), right_id = Find(right), joined_id = Find(joined);
    if (!left_id || !right_id || !joined_id) {
      return Wrong(absl::StrCat("model.merges joins '", left.substr(0, 100), "' and '", right.substr(0, 100), "' at rank ", rank,
                                "; model.vocab lacks '",
                                (!left_id    ? left
                                 : !right_id ? right
                                             : joined)
                                    .substr(0, 200),
                                "'"));
    }
    merges_.Add(*left_id, *right_id, static_cast<int32_t>(rank), *joined_id);
  }
  return model.status();
}

absl::Status BpeTokenizer::LoadAddedTokens(const json& list) {
  if (!list.is_array()) return Wrong("added_tokens is not an array");
  if (list.size() > kMaxAddedTokens)
    return Wrong(absl::StrCat("added_tokens has ", list.size(), " entries; at most ", kMaxAddedTokens, " are accepted"));
  for (const json& entry : list) {
    JsonFields fields(entry, "added_tokens");
    AddedToken token = {.id = static_cast<int32_t>(fields.Int("id", 0, kMaxIds - 1)), .content = fields.String("content")};
    token.special = fields.Bool("special", false);
    token.single_word = fields.Bool("single_word", false);
    token.lstrip = fields.Bool("lstrip", false);
    token.rstrip = fields.Bool("rstrip", false);
    token.normalized = fields.Bool("normalized", !token.special);
    if (!fields.status().ok()) return fields.status();
    if (token.content.empty()) continue;
    if (token.content.size() > kMaxAddedBytes) {
      return Wrong(absl::StrCat("added_tokens: token ", token.id, " has ", token.content.size(), " bytes; at most ", kMaxAddedBytes,
                                " are accepted"));
    }
    const std::optional<int32_t> known = Find(token.content);
    if (known && *known != token.id) {
      return Wrong(absl::StrCat("added_tokens gives '", token.content.substr(0, 100), "' the id ", token.id, "; it has ", *known));
    }
    if (static_cast<size_t>(token.id) > bytes_.size() + kMaxAddedTokens) {
      return Wrong(absl::StrCat("added_tokens gives '", token.content.substr(0, 100), "' the id ", token.id, "; there are ",
                                bytes_.size(), " tokens before it"));
    }
    if (static_cast<size_t>(token.id) >= bytes_.size()) bytes_.resize(static_cast<size_t>(token.id) + 1);
    ids_.emplace(token.content, token.id);
    bytes_[token.id] = decoder_.Bytes(token.content);
    if (token.special) special_.insert_or_assign(token.id, token.content);
    if (!token.normalized || normalizer_.empty()) {
      (token.normalized ? added_normalized_ : added_).Add(token, token.content);
    } else {
      LOAD_OR_RETURN(const std::string content, normalizer_.Apply(token.content));
      added_normalized_.Add(token, content);
    }
  }
  return absl::OkStatus();
}

// Only what it puts in front and behind matters: begin- and end-of-sequence tokens.
absl::Status BpeTokenizer::LoadPostProcessor(const json& description, int depth) {
  if (description.is_null()) return absl::OkStatus();
  JsonFields fields(description, "post_processor");
  const std::string type = fields.String("type");
  if (!fields.status().ok()) return fields.status();
  if (type == "ByteLevel") return absl::OkStatus();
  if (type == "Sequence") {
    if (depth > 4) return Wrong("post_processor: is nested too deep");
    for (const json& part : fields.Array("processors")) {
      if (absl::Status s = LoadPostProcessor(part, depth + 1); !s.ok()) return s;
    }
    return fields.status();
  }
  if (type != "TemplateProcessing") {
    return absl::UnimplementedError(
        absl::StrCat("post_processor: type is '", type.substr(0, 100), "'; known are TemplateProcessing, ByteLevel, Sequence"));
  }
  bool before = true;
  for (const json& part : fields.Array("single")) {
    if (!part.is_object() || part.size() != 1) return Wrong("post_processor: single has an entry that is no object of one key");
    if (part.begin().key() == "Sequence") {
      before = false;
      continue;
    }
    JsonFields token(part.begin().value(), "post_processor");
    const std::string content = token.String("id");
    if (!token.status().ok()) return token.status();
    const std::optional<int32_t> id = Find(content);
    if (!id) return Wrong(absl::StrCat("post_processor has the token '", content.substr(0, 100), "', which the vocabulary lacks"));
    if (before && bos_) return absl::UnimplementedError("post_processor puts more than one token in front of a text");
    if (before)
      bos_ = id;
    else
      template_eos_ = id;
  }
  adds_bos_ = bos_.has_value();
  return fields.status();
}

// tokenizer_config.json names them as strings or as objects with `content`.
void BpeTokenizer::ChooseEnds(const json& config) {
  const auto named = [&](const char* key) -> std::optional<int32_t> {
    if (!config.is_object()) return std::nullopt;
    auto it = config.find(key);
    if (it == config.end()) return std::nullopt;
    const json& token = it->is_object() && it->contains("content") ? it->at("content") : *it;
    return token.is_string() ? Find(token.get<std::string>()) : std::nullopt;
  };
  const auto first_of = [&](std::initializer_list<const char*> names) -> std::optional<int32_t> {
    for (const char* name : names) {
      if (const std::optional<int32_t> id = Find(name); id && special_.contains(*id)) return id;
    }
    return std::nullopt;
  };
  if (!bos_) bos_ = named("bos_token");
  if (config.is_object() && config.contains("add_bos_token") && config["add_bos_token"].is_boolean()) {
    adds_bos_ = config["add_bos_token"].get<bool>() && bos_.has_value();
  }
  eos_ = named("eos_token");
  if (!eos_) eos_ = template_eos_;
  if (!eos_) eos_ = first_of({"</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>"});
  end_of_turn_ = first_of({"<|im_end|>", "<|eot_id|>"});
}

absl::StatusOr<std::vector<int32_t>> BpeTokenizer::Encode(const std::string& text, const EncodeOptions& options) const {
  if (const size_t at = FindBrokenUtf8(text); at != std::string::npos) {
    return absl::InvalidArgumentError(absl::StrCat("text: is not UTF-8 at byte ", at));
  }
  std::vector<int32_t> ids;
  ids.reserve(text.size() / 3 + 4);
  const auto on_token = [&](int32_t id) { ids.push_back(id); };
  const auto on_text = [&](std::string_view part, size_t offset) -> absl::Status {
    const auto encode = [&](std::string_view rest, size_t at) { return EncodePart(rest, offset + at == 0, ids); };
    if (normalizer_.empty() && added_normalized_.empty()) return encode(part, 0);
    absl::StatusOr<std::string> normalized = normalizer_.Apply(std::string(part));
    if (!normalized.ok()) return normalized.status();
    // Special tokens that are looked for only here are rare; what users wrote is not told apart from the rest any more, so where
    // there is any, none is taken.
    const EncodeOptions after = {.allow_special = options.allow_special && options.literal.empty()};
    return added_normalized_.Split(*normalized, 0, after, encode, on_token);
  };
  if (absl::Status s = added_.Split(text, 0, options, on_text, on_token); !s.ok()) return s;
  return ids;
}

absl::Status BpeTokenizer::EncodePart(std::string_view text, bool starts_text, std::vector<int32_t>& ids) const {
  std::deque<std::string> written;
  std::vector<std::string_view> pieces;
  if (absl::Status s = pre_tokenizer_.Split(text, starts_text, written, pieces); !s.ok()) return s;
  std::vector<int32_t> symbols;
  for (const std::string_view piece : pieces) EncodePiece(piece, symbols, ids);
  return absl::OkStatus();
}

void BpeTokenizer::EncodePiece(std::string_view piece, std::vector<int32_t>& symbols, std::vector<int32_t>& ids) const {
  if (ignore_merges_) {
    if (const auto it = pieces_.find(Key(piece)); it != pieces_.end()) {
      ids.push_back(it->second);
      return;
    }
  }
  symbols.clear();
  if (!pre_tokenizer_.byte_level()) {
    AddCharacters(piece, symbols);
  } else {
    bool unknown_before = false;
    for (const char c : piece) {
      const int32_t id = byte_ids_[static_cast<unsigned char>(c)];
      if (id >= 0)
        symbols.push_back(id);
      else if (unknown_ && !(fuse_unknown_ && unknown_before))
        symbols.push_back(*unknown_);
      unknown_before = id < 0;
    }
  }
  merges_.Apply(symbols, ids);
}

void BpeTokenizer::AddCharacters(std::string_view piece, std::vector<int32_t>& symbols) const {
  bool unknown_before = false;
  for (size_t at = 0; at < piece.size();) {
    const std::string_view character = piece.substr(at, CharacterBytes(piece.substr(at)));
    at += character.size();
    if (const auto it = characters_.find(Key(character)); it != characters_.end()) {
      symbols.push_back(it->second);
      unknown_before = false;
      continue;
    }
    if (byte_fallback_) {
      bool all = true;
      for (const char c : character) all = all && byte_ids_[static_cast<unsigned char>(c)] >= 0;
      if (all) {
        for (const char c : character) symbols.push_back(byte_ids_[static_cast<unsigned char>(c)]);
        unknown_before = false;
        continue;
      }
    }
    if (unknown_ && !(fuse_unknown_ && unknown_before)) symbols.push_back(*unknown_);
    unknown_before = true;
  }
}

std::string BpeTokenizer::FirstTokenBytes(int32_t id, bool* still_first) const {
  std::string bytes = TokenBytes(id);
  *still_first = false;
  if (decoder_.start == Decoder::Start::kSpaceDropped) {
    *still_first = bytes.empty();
    if (bytes.starts_with(' ')) bytes.erase(0, 1);
  } else if (decoder_.start == Decoder::Start::kMetaspacesDropped) {
    // The decoder leaves out every U+2581 of the first token, wherever it stands in it.
    bytes = absl::StrReplaceAll(bytes, {{" ", ""}});
  }
  return bytes;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> LoadBpe(const std::string& path) {
  LOAD_OR_RETURN(const std::string text, ReadFile(path, kMaxFileBytes));
  const std::string config_path = absl::StrCat(path.substr(0, path.rfind('/') + 1), "tokenizer_config.json");
  json config;
  if (absl::StatusOr<std::string> config_text = ReadFile(config_path, kMaxConfigBytes); config_text.ok()) {
    LOAD_OR_RETURN(config, ParseJsonObject(*config_text, config_path));
  } else if (!absl::IsNotFound(config_text.status())) {
    return config_text.status();
  }
  auto tokenizer = std::make_unique<BpeTokenizer>();
  if (absl::Status s = tokenizer->Load(text, config); !s.ok()) return absl::Status(s.code(), absl::StrCat(path, ": ", s.message()));
  return tokenizer;
}

}  // namespace memserve::engine
