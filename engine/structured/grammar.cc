#include "engine/structured/grammar.h"

#include <algorithm>
#include <ctime>
#include <exception>
#include <new>
#include <random>
#include <set>
#include <stdexcept>
#include <utility>
#include <variant>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "engine/tokenizer/utf8.h"
#include "engine/validate.h"

#ifdef MEMSERVE_STRUCTURED
#include "nlohmann/json.hpp"
#include "xgrammar/xgrammar.h"
#endif

namespace memserve::engine {
namespace {

constexpr char kFields[][16] = {"json", "json_schema", "regex", "grammar", "choice"};

absl::Status Bad(const StructuredOutput& structured, absl::string_view message) {
  return absl::InvalidArgumentError(absl::StrCat(FieldOf(structured), ": ", message));
}

}  // namespace

std::string FieldOf(const StructuredOutput& structured) {
  return absl::StrCat("structured.", kFields[static_cast<int>(structured.kind)]);
}

absl::Status Validate(const StructuredOutput& structured) {
  if (structured.kind == StructuredOutput::Kind::kJson) return absl::OkStatus();
  if (structured.kind != StructuredOutput::Kind::kChoice) {
    if (structured.text.empty() || structured.text.size() > kMaxStructuredBytes) {
      return Bad(structured, absl::StrCat("has ", structured.text.size(), " bytes; 1 to ", kMaxStructuredBytes, " are accepted"));
    }
    if (FindBrokenUtf8(structured.text) != std::string::npos) return Bad(structured, "is not UTF-8");
    if (structured.text.find('\0') != std::string::npos) return Bad(structured, "has a byte 0");
    return absl::OkStatus();
  }
  if (structured.choices.empty() || structured.choices.size() > kMaxChoiceTexts) {
    return Bad(structured, absl::StrCat("has ", structured.choices.size(), " texts; 1 to ", kMaxChoiceTexts, " are accepted"));
  }
  size_t bytes = 0;
  for (size_t i = 0; i < structured.choices.size(); ++i) {
    if (structured.choices[i].empty()) return Bad(structured, absl::StrCat("text ", i, " is empty"));
    if (FindBrokenUtf8(structured.choices[i]) != std::string::npos)
      return Bad(structured, absl::StrCat("text ", i, " is not UTF-8"));
    if (structured.choices[i].find('\0') != std::string::npos) return Bad(structured, absl::StrCat("text ", i, " has a byte 0"));
    bytes += structured.choices[i].size();
  }
  if (bytes <= kMaxStructuredBytes) return absl::OkStatus();
  return Bad(structured, absl::StrCat("has ", bytes, " bytes; at most ", kMaxStructuredBytes, " are accepted"));
}

absl::Status TryGrammar(const Grammar& grammar, int vocab_size, absl::Duration limit) {
  constexpr int kTexts = 2;
  constexpr int kMostTokens = 128;
  constexpr int kMostLimits = 5;  // of time, for all of it
  std::mt19937 random(1);
  const absl::Time begin = absl::Now();
  for (int text = 0; text < kTexts; ++text) {
    const std::unique_ptr<GrammarMatcher> matcher = grammar.NewMatcher();
    if (matcher == nullptr) return absl::ResourceExhaustedError("it needs too much memory");
    std::vector<int32_t> drawn, next;
    while (drawn.size() < kMostTokens && absl::Now() - begin < kMostLimits * limit) {
      const bool matches = matcher->MoveTo(drawn);
      const std::vector<uint32_t>& allowed = matcher->Allowed();
      if (matcher->slowest() > limit) {
        return absl::InvalidArgumentError(absl::StrCat("finding out what may come next took more than ",
                                                       absl::FormatDuration(limit), " for one token (--grammar_mask_timeout_ms)"));
      }
      next.clear();
      for (int32_t id = 0; id < vocab_size; ++id) {
        if ((allowed[id / 32] >> (id % 32) & 1) != 0) next.push_back(id);
      }
      if (!matches || next.empty()) break;
      drawn.push_back(next[random() % next.size()]);
    }
  }
  return absl::OkStatus();
}

#ifndef MEMSERVE_STRUCTURED

bool StructuredOutputIsBuilt() { return false; }

namespace {
absl::Status NotBuilt() { return absl::UnimplementedError("structured: this server was built without structured output"); }
}  // namespace

absl::StatusOr<std::unique_ptr<GrammarVocabulary>> GrammarVocabulary::New(const std::vector<std::string>&) { return NotBuilt(); }
absl::StatusOr<std::string> CompileGrammar(const GrammarVocabulary&, const StructuredOutput&) { return NotBuilt(); }
absl::StatusOr<std::shared_ptr<const Grammar>> ReadGrammar(std::shared_ptr<const GrammarVocabulary>, StructuredOutput::Kind,
                                                           const std::string&) {
  return NotBuilt();
}

#else

bool StructuredOutputIsBuilt() { return true; }

namespace {

// What the library warned of since it was last asked: parts that it would ignore.
thread_local std::string warnings;

// A line for a client.
std::string OneLine(absl::string_view text) {
  constexpr size_t kMost = 300;
  std::string line(text.substr(0, kMost));
  for (char& c : line) {
    if (absl::ascii_iscntrl(c)) c = ' ';
  }
  while (FindBrokenUtf8(line) != std::string::npos) line.pop_back();  // cut within a character
  return std::string(absl::StripAsciiWhitespace(line));
}

// Runs what may throw. Nothing of the library's exceptions leaves this file.
template <typename F>
absl::Status Guard(F&& run) {
  try {
    run();
    return absl::OkStatus();
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError("it needs too much memory");
  } catch (const std::exception& e) {
    return absl::InvalidArgumentError(OneLine(e.what()));
  }
}

class Vocabulary final : public GrammarVocabulary {
 public:
  explicit Vocabulary(const std::vector<std::string>& tokens)
      : info(tokens, xgrammar::VocabType::RAW, static_cast<int>(tokens.size()), std::vector<int32_t>()),
        text((tokens.size() + 31) / 32),
        json_text(text.size()) {
    for (size_t id = 0; id < tokens.size(); ++id) {
      const auto is_control = [](char c) { return absl::ascii_iscntrl(c) && c != '\n' && c != '\x7f'; };
      if (tokens[id].empty()) continue;
      text[id / 32] |= 1u << (id % 32);
      if (std::none_of(tokens[id].begin(), tokens[id].end(), is_control)) json_text[id / 32] |= 1u << (id % 32);
    }
  }

  const xgrammar::TokenizerInfo info;
  std::vector<uint32_t> text;  // the tokens that stand for some
  std::vector<uint32_t>
      json_text;  // of those without control characters, which the library lets into JSON strings of bounded length
};

absl::Duration ThreadTime() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return absl::DurationFromTimespec(now);
}

class Matcher final : public GrammarMatcher {
 public:
  // `text`: the vocabulary's tokens that may be drawn at all.
  Matcher(std::shared_ptr<const Vocabulary> vocabulary, const std::vector<uint32_t>& text, const xgrammar::CompiledGrammar& grammar)
      : vocabulary_(std::move(vocabulary)), text_(text), matcher_(grammar) {}

  bool MoveTo(absl::Span<const int32_t> drawn) override {
    size_t common = 0;
    while (common < drawn.size() && common < drawn_.size() && drawn[common] == drawn_[common]) ++common;
    if (common == drawn_.size() && common == drawn.size()) return !broken_;
    const absl::Duration begin = ThreadTime();
    const absl::Status status = Guard([&] {
      if (common < drawn_.size()) {
        matcher_.Rollback(static_cast<int>(drawn_.size() - common));
        drawn_.resize(common);
        allowed_.clear();
      }
      for (; drawn_.size() < drawn.size(); drawn_.push_back(drawn[drawn_.size()])) {
        const int32_t token = drawn[drawn_.size()];
        if (!IsText(token) || !matcher_.AcceptToken(token)) break;
        allowed_.clear();
      }
    });
    broken_ |= !status.ok();
    slowest_ = std::max(slowest_, ThreadTime() - begin);
    return !broken_ && drawn_.size() == drawn.size();
  }

  const std::vector<uint32_t>& Allowed() override {
    if (!allowed_.empty()) return allowed_;
    const absl::Duration begin = ThreadTime();
    const std::vector<uint32_t>& text = text_;
    std::vector<uint32_t> mask(text.size());
    int64_t shape[] = {static_cast<int64_t>(mask.size())};
    DLTensor tensor = {
        .data = mask.data(), .device = {kDLCPU, 0}, .ndim = 1, .dtype = xgrammar::GetBitmaskDLType(), .shape = shape};
    bool restricts = true;
    const absl::Status status = Guard([&] { restricts = matcher_.FillNextTokenBitmask(&tensor); });
    broken_ |= !status.ok();
    for (size_t i = 0; i < mask.size(); ++i) mask[i] = broken_ ? 0 : restricts ? mask[i] & text[i] : text[i];
    slowest_ = std::max(slowest_, ThreadTime() - begin);
    allowed_ = std::move(mask);
    return allowed_;
  }

  bool IsComplete() const override { return !broken_ && matcher_.IsCompleted(); }
  absl::Duration slowest() const override { return slowest_; }

 private:
  bool IsText(int32_t id) const {
    return id >= 0 && static_cast<size_t>(id) / 32 < text_.size() && (text_[id / 32] >> (id % 32) & 1) != 0;
  }

  const std::shared_ptr<const Vocabulary> vocabulary_;
  const std::vector<uint32_t>& text_;
  xgrammar::GrammarMatcher matcher_;
  std::vector<int32_t> drawn_;
  std::vector<uint32_t> allowed_;  // after drawn_; empty: not known yet
  bool broken_ = false;            // the library threw
  absl::Duration slowest_;
};

class Compiled final : public Grammar {
 public:
  Compiled(std::shared_ptr<const Vocabulary> vocabulary, bool json, xgrammar::CompiledGrammar grammar)
      : vocabulary_(std::move(vocabulary)),
        json_(json),
        grammar_(std::move(grammar)),
        bytes_(static_cast<int64_t>(grammar_.MemorySizeBytes())) {}
  int64_t bytes() const override { return bytes_; }
  std::unique_ptr<GrammarMatcher> NewMatcher() const override {
    std::unique_ptr<GrammarMatcher> matcher;
    const absl::Status status = Guard(
        [&] { matcher = std::make_unique<Matcher>(vocabulary_, json_ ? vocabulary_->json_text : vocabulary_->text, grammar_); });
    return matcher;
  }

 private:
  const std::shared_ptr<const Vocabulary> vocabulary_;
  const bool json_;
  const xgrammar::CompiledGrammar grammar_;
  const int64_t bytes_;
};

std::string AlternativesOf(const std::vector<std::string>& choices) {
  std::string grammar = "root ::= ";
  for (size_t i = 0; i < choices.size(); ++i) {
    absl::StrAppend(&grammar, i > 0 ? " | " : "", "\"");
    for (const char c : choices[i]) {
      if (c == '"' || c == '\\')
        absl::StrAppend(&grammar, "\\", std::string(1, c));
      else if (absl::ascii_iscntrl(c))
        absl::StrAppend(&grammar, "\\u", absl::Hex(static_cast<unsigned char>(c), absl::kZeroPad4));
      else
        grammar += c;
    }
    grammar += '"';
  }
  return grammar;
}

// The library leaves some keywords out of account, in silence: then it would allow what the schema does not. Those are refused.
void CheckKeywords(const nlohmann::json& schema) {
  if (schema.is_array()) {
    for (const nlohmann::json& one : schema) CheckKeywords(one);
    return;
  }
  if (!schema.is_object()) return;
  for (const char* keyword : {"not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies", "contains",
                              "minContains", "maxContains", "$dynamicRef", "$recursiveRef"}) {
    if (schema.contains(keyword)) throw std::runtime_error(absl::StrCat("the keyword '", keyword, "' is not supported"));
  }
  if (schema.value("uniqueItems", nlohmann::json(false)) != false)
    throw std::runtime_error("the keyword 'uniqueItems' is not supported");
  for (const char* alone : {"$ref", "anyOf", "oneOf", "allOf", "const", "enum"}) {
    if (!schema.contains(alone)) continue;
    static const std::set<std::string> kBeside = {"$defs",       "definitions", "$schema",  "$id",        "$comment", "title",
                                                  "description", "default",     "examples", "deprecated", "readOnly", "writeOnly"};
    const bool of_values = alone == std::string("const") || alone == std::string("enum");
    for (const auto& [key, value] : schema.items()) {
      if (key == alone || kBeside.count(key) > 0 || (of_values && key == "type")) continue;
      throw std::runtime_error(absl::StrCat("the keywords '", alone, "' and '", key, "' are not supported together"));
    }
  }
  for (const auto& [key, value] : schema.items()) {
    if (key == "properties" || key == "patternProperties" || key == "$defs" || key == "definitions") {
      if (!value.is_object()) continue;
      for (const auto& [name, one] : value.items()) CheckKeywords(one);
    } else if (key != "enum" && key != "const" && key != "default" && key != "examples") {
      CheckKeywords(value);
    }
  }
}

// More white space than this between two parts of a JSON text says nothing.
constexpr int kMaxJsonSpaces = 8;

xgrammar::Grammar Parse(const StructuredOutput& structured) {
  const auto schema = [](const std::string& text) {
    return xgrammar::Grammar::FromJSONSchema(text, /*any_whitespace=*/true, std::nullopt, std::nullopt, /*strict_mode=*/true,
                                             kMaxJsonSpaces);
  };
  switch (structured.kind) {
    case StructuredOutput::Kind::kJson:
      return schema("true");
    case StructuredOutput::Kind::kJsonSchema:
      CheckKeywords(nlohmann::json::parse(structured.text));
      return schema(structured.text);
    case StructuredOutput::Kind::kRegex:
      return xgrammar::Grammar::FromRegex(structured.text);
    case StructuredOutput::Kind::kGrammar:
      return xgrammar::Grammar::FromEBNF(structured.text);
    case StructuredOutput::Kind::kChoice:
      return xgrammar::Grammar::FromEBNF(AlternativesOf(structured.choices));
  }
  throw std::logic_error("no such kind");
}

}  // namespace

absl::StatusOr<std::unique_ptr<GrammarVocabulary>> GrammarVocabulary::New(const std::vector<std::string>& tokens) {
  std::unique_ptr<GrammarVocabulary> vocabulary;
  const absl::Status status = Guard([&] { vocabulary = std::make_unique<Vocabulary>(tokens); });
  if (!status.ok()) return status;
  return vocabulary;
}

absl::StatusOr<std::string> CompileGrammar(const GrammarVocabulary& vocabulary, const StructuredOutput& structured) {
  std::string compiled;
  warnings.clear();
  const absl::Status status = Guard([&] {
    const xgrammar::Grammar grammar = Parse(structured);
    if (!warnings.empty()) return;
    xgrammar::GrammarCompiler compiler(static_cast<const Vocabulary&>(vocabulary).info, /*max_threads=*/1, /*cache_enabled=*/false);
    compiled = compiler.CompileGrammar(grammar).SerializeJSON();
  });
  if (!status.ok()) return status;
  if (!warnings.empty()) return absl::InvalidArgumentError(OneLine(warnings));
  return compiled;
}

absl::StatusOr<std::shared_ptr<const Grammar>> ReadGrammar(std::shared_ptr<const GrammarVocabulary> vocabulary,
                                                           StructuredOutput::Kind kind, const std::string& compiled) {
  const auto typed = std::static_pointer_cast<const Vocabulary>(std::move(vocabulary));
  std::shared_ptr<const Grammar> grammar;
  const absl::Status status = Guard([&] {
    auto read = xgrammar::CompiledGrammar::DeserializeJSON(compiled, typed->info);
    if (auto* error = std::get_if<xgrammar::SerializationError>(&read)) {
      throw std::runtime_error(std::visit([](const auto& e) { return std::string(e.what()); }, *error));
    }
    const bool json = kind == StructuredOutput::Kind::kJson || kind == StructuredOutput::Kind::kJsonSchema;
    grammar = std::make_shared<Compiled>(typed, json, std::get<xgrammar::CompiledGrammar>(std::move(read)));
  });
  if (!status.ok()) return absl::InternalError(status.message());
  return grammar;
}

}  // namespace memserve::engine

// What the library calls with its messages (XGRAMMAR_LOG_CUSTOMIZE).
namespace xgrammar {
[[noreturn]] void LogFatalImpl(const std::string&, int, const std::string& message);
void LogMessageImpl(const std::string&, int, int level, const std::string& message);

void LogFatalImpl(const std::string&, int, const std::string& message) { throw std::runtime_error(message); }
void LogMessageImpl(const std::string&, int, int level, const std::string& message) {
  constexpr int kWarning = 2;
  if (level < kWarning || memserve::engine::warnings.size() > 1000) return;
  if (!memserve::engine::warnings.empty()) memserve::engine::warnings += "; ";
  memserve::engine::warnings += message;
}
}  // namespace xgrammar

namespace memserve::engine {
#endif

}  // namespace memserve::engine
