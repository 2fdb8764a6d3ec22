// Structured output through the whole engine: what is generated matches, and what explodes fails alone.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <regex>
#include <set>
#include <thread>

#include "absl/strings/str_cat.h"
#include "engine/engine.h"
#include "engine/structured/grammar.h"
#include "nlohmann/json.hpp"
#include "tests/support/collector.h"
#include "tests/support/engines.h"
#include "tests/support/golden.h"

namespace memserve::engine {
namespace {

using memserve::testing::Collector;
using memserve::testing::ExpectNoPagesLeft;
using memserve::testing::Generate;
using memserve::testing::GenerateAll;
using memserve::testing::Generated;
using memserve::testing::ParityOptions;
using memserve::testing::Start;
using ::testing::HasSubstr;
using ::testing::StartsWith;
using Kind = StructuredOutput::Kind;

EngineOptions Options(const std::string& golden) {
  return ParityOptions(std::string(MEMSERVE_GOLDEN_DIR) + "/" + golden + "/checkpoint");
}

class StructuredTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!StructuredOutputIsBuilt()) GTEST_SKIP() << "built without structured output";
  }

  static GenerateRequest Request(StructuredOutput structured, uint64_t seed, int max_tokens = 120) {
    GenerateRequest request;
    request.prompt = "The keeper";
    request.structured = std::move(structured);
    request.sampling = {.temperature = 3.0f, .seed = seed};
    request.stop.max_tokens = max_tokens;
    request.logprobs = true;
    return request;
  }

  // Texts of many seeds that ended by themselves. Others were cut by max_tokens.
  static std::vector<std::string> Texts(Engine& engine, const StructuredOutput& structured, int seeds = 40) {
    std::vector<GenerateRequest> requests;
    for (int seed = 1; seed <= seeds; ++seed) requests.push_back(Request(structured, static_cast<uint64_t>(seed)));
    std::vector<std::string> texts;
    for (const Generated& generated : GenerateAll(engine, requests)) {
      EXPECT_TRUE(generated.finished.ok()) << generated.finished.status();
      if (generated.finished.ok() && generated.finished->reason == FinishReason::kStop) texts.push_back(generated.text);
    }
    return texts;
  }

  static absl::Status Error(Engine& engine, StructuredOutput structured) {
    return Generate(engine, Request(std::move(structured), 1)).finished.status();
  }
};

// A vocabulary of bytes, one of SentencePiece, one of tiktoken.
class StructuredKindsTest : public StructuredTest, public ::testing::WithParamInterface<std::string> {};

TEST_P(StructuredKindsTest, ARegularExpressionIsMatched) {
  const std::unique_ptr<Engine> engine = Start(Options(GetParam()));
  for (const char* pattern : {"[0-9]{4}-[0-9]{2}", "(yes|no|maybe)!", "[a-f]+;", " ?(ab|c){2,5}x", "é{2}[à-ü]"}) {
    const std::vector<std::string> texts = Texts(*engine, {.kind = Kind::kRegex, .text = pattern});
    EXPECT_GT(texts.size(), 20u) << pattern;
    if (pattern[0] == '\xc3') {
      for (const std::string& text : texts) EXPECT_TRUE(std::regex_match(text, std::regex("(é){2}\xc3[\xa0-\xbc]"))) << text;
    } else {
      for (const std::string& text : texts) EXPECT_TRUE(std::regex_match(text, std::regex(pattern))) << pattern << ": " << text;
    }
  }
}

TEST_P(StructuredKindsTest, OneOfTheChoicesIsGenerated) {
  const std::unique_ptr<Engine> engine = Start(Options(GetParam()));
  const std::vector<std::string> choices = {"yes", "no", "no, never", "\"quoted\\\"", "tab\tand\nline", "日本"};
  std::set<std::string> seen;
  for (const std::string& text : Texts(*engine, {.kind = Kind::kChoice, .choices = choices})) {
    EXPECT_THAT(choices, ::testing::Contains(text));
    seen.insert(text);
  }
  EXPECT_GE(seen.size(), 3u);
}

TEST_P(StructuredKindsTest, ASchemasJsonIsGenerated) {
  const std::unique_ptr<Engine> engine = Start(Options(GetParam()));
  const std::string schema = R"({"type":"object","properties":{"name":{"type":"string","maxLength":6},
    "age":{"type":"integer","minimum":0,"maximum":130},"tags":{"type":"array","items":{"enum":["red","blue"]},"maxItems":2},
    "ok":{"type":"boolean"}},"required":["name","age","tags","ok"]})";
  const std::vector<std::string> texts = Texts(*engine, {.kind = Kind::kJsonSchema, .text = schema});
  EXPECT_GT(texts.size(), 10u);
  for (const std::string& text : texts) {
    const nlohmann::json json = nlohmann::json::parse(text, nullptr, false);
    ASSERT_TRUE(json.is_object()) << text;
    EXPECT_EQ(json.size(), 4u) << text;
    EXPECT_TRUE(json.at("name").is_string()) << text;
    EXPECT_TRUE(json.at("age").is_number_integer() && json.at("age") >= 0 && json.at("age") <= 130) << text;
    EXPECT_TRUE(json.at("ok").is_boolean()) << text;
    ASSERT_LE(json.at("tags").size(), 2u) << text;
    for (const auto& tag : json.at("tags")) EXPECT_TRUE(tag == "red" || tag == "blue") << text;
  }
}

TEST_P(StructuredKindsTest, AnyJsonIsJson) {
  const std::unique_ptr<Engine> engine = Start(Options(GetParam()));
  const std::vector<std::string> texts = Texts(*engine, {.kind = Kind::kJson}, 60);
  EXPECT_GT(texts.size(), 5u);
  for (const std::string& text : texts) {
    // Numbers may have exponents that no double holds.
    EXPECT_TRUE(nlohmann::json::accept(std::regex_replace(text, std::regex("[eE][+-]?[0-9]+"), "e1"))) << text;
  }
}

TEST_P(StructuredKindsTest, AGrammarMayNest) {
  const std::unique_ptr<Engine> engine = Start(Options(GetParam()));
  const std::vector<std::string> texts = Texts(
      *engine, {.kind = Kind::kGrammar, .text = "root ::= pair\npair ::= \"(\" pair \")\" | \"[\" pair \"]\" | [a-z]{1,2}\n"});
  EXPECT_GT(texts.size(), 10u);
  for (const std::string& text : texts) {
    std::string open;
    for (const char c : text) {
      if (c == '(' || c == '[')
        open += c;
      else if (c == ')' || c == ']') {
        ASSERT_FALSE(open.empty()) << text;
        EXPECT_EQ(open.back(), c == ')' ? '(' : '[') << text;
        open.pop_back();
      } else {
        EXPECT_TRUE(c >= 'a' && c <= 'z') << text;
      }
    }
    EXPECT_TRUE(open.empty()) << text;
  }
}

INSTANTIATE_TEST_SUITE_P(Vocabularies, StructuredKindsTest, ::testing::Values("A", "F", "H"));

TEST_F(StructuredTest, ItEndsWhereNothingMayFollow) {
  const std::unique_ptr<Engine> engine = Start(Options("A"));
  GenerateRequest request = Request({.kind = Kind::kRegex, .text = "abc"}, 3);
  request.stop.ignore_eos = true;
  request.stop.min_tokens = 50;
  const Generated generated = Generate(*engine, request);
  ASSERT_TRUE(generated.finished.ok()) << generated.finished.status();
  EXPECT_EQ(generated.text, "abc");
  EXPECT_EQ(generated.finished->reason, FinishReason::kStop);
  EXPECT_EQ(generated.finished->usage.completion_tokens, 3);
}

TEST_F(StructuredTest, WhereMoreMayFollowAnEndOfSequenceTokenEndsIt) {
  const std::unique_ptr<Engine> engine = Start(Options("A"));
  const int32_t eos = engine->model().eos_token_ids.at(0);
  GenerateRequest request = Request({.kind = Kind::kRegex, .text = "ab*"}, 3);
  request.sampling.logit_bias = {{eos, 1000.0f}};
  Generated generated = Generate(*engine, request);
  EXPECT_EQ(generated.text, "a");  // not before: the empty text does not match
  EXPECT_EQ(generated.finished->stop_token_id, eos);
  request.stop.min_tokens = 5;
  generated = Generate(*engine, request);
  EXPECT_EQ(generated.text, "abbbb");
  request.stop.ignore_eos = true;
  generated = Generate(*engine, request);
  EXPECT_EQ(generated.text, "a" + std::string(119, 'b'));
  EXPECT_EQ(generated.finished->reason, FinishReason::kLength);
}

TEST_F(StructuredTest, BannedAndAllowedTokensCountToo) {
  const std::unique_ptr<Engine> engine = Start(Options("A"));
  GenerateRequest request = Request({.kind = Kind::kRegex, .text = "[abc]{5}"}, 3);
  request.sampling.banned_token_ids = {'a'};
  request.sampling.allowed_token_ids = {'a', 'b'};
  EXPECT_EQ(Generate(*engine, request).text, "bbbbb");
  request.structured->text = "b{2}(a|c)x";
  EXPECT_EQ(Generate(*engine, request).finished.status(),
            absl::InvalidArgumentError("structured.regex: after 2 tokens none that would match may be drawn"));
  request.structured->text = "c";
  EXPECT_EQ(Generate(*engine, request).finished.status(),
            absl::InvalidArgumentError("structured.regex: no token that may be drawn begins a match"));
  ExpectNoPagesLeft(*engine);
}

TEST_F(StructuredTest, WhatCannotBeParsedIsAnErrorOfOneLine) {
  const std::unique_ptr<Engine> engine = Start(Options("A"));
  const auto expect = [&](StructuredOutput structured, const char* begins) {
    const absl::Status status = Error(*engine, std::move(structured));
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_THAT(std::string(status.message()), StartsWith(begins));
    EXPECT_EQ(status.message().find('\n'), std::string::npos);
    EXPECT_LT(status.message().size(), 400u);
  };
  expect({.kind = Kind::kRegex, .text = "a("}, "structured.regex: ");
  expect({.kind = Kind::kRegex, .text = "(?=a)b"}, "structured.regex: ");
  expect({.kind = Kind::kRegex, .text = ""}, "structured.regex: has 0 bytes; 1 to 65536 are accepted");
  expect({.kind = Kind::kRegex, .text = std::string(65537, 'a')}, "structured.regex: has 65537 bytes; 1 to 65536 are accepted");
  expect({.kind = Kind::kRegex, .text = "\xff"}, "structured.regex: is not UTF-8");
  expect({.kind = Kind::kRegex, .text = "(a?){0}"}, "structured.regex: ");
  expect({.kind = Kind::kGrammar, .text = "root ::= other"}, "structured.grammar: ");
  expect({.kind = Kind::kGrammar, .text = "start ::= \"a\""}, "structured.grammar: ");
  expect({.kind = Kind::kJsonSchema, .text = "{\"type\":"}, "structured.json_schema: ");
  expect({.kind = Kind::kJsonSchema, .text = "{\"type\":\"thing\"}"}, "structured.json_schema: ");
  expect({.kind = Kind::kJsonSchema, .text = "{\"$ref\":\"#/nowhere\"}"}, "structured.json_schema: ");
  expect({.kind = Kind::kJsonSchema, .text = "{\"type\":\"number\",\"multipleOf\":0.3}"}, "structured.json_schema: ");
  expect({.kind = Kind::kChoice}, "structured.choice: has 0 texts; 1 to 1024 are accepted");
  expect({.kind = Kind::kChoice, .choices = std::vector<std::string>(1025, "a")},
         "structured.choice: has 1025 texts; 1 to 1024 are accepted");
  expect({.kind = Kind::kChoice, .choices = {"a", ""}}, "structured.choice: text 1 is empty");
  EXPECT_EQ(Generate(*engine, Request({.kind = Kind::kRegex, .text = "[xy]"}, 1)).text.size(), 1u);
}

// Each rule may be empty, and is made of others that may be: 150 of them take many seconds to compile.
std::string Bomb(int rules) {
  std::string grammar = "root ::= r0\n";
  for (int i = 0; i < rules; ++i) {
    absl::StrAppend(&grammar, "r", i, " ::= \"\" | \"a\"");
    for (int j = 0; j < rules; j += 7) absl::StrAppend(&grammar, " | r", j, " r", (7 * j + 3) % rules);
    grammar += "\n";
  }
  return grammar;
}

TEST_F(StructuredTest, AWorkerThatTakesTooLongIsKilledAndStartedAgain) {
  EngineOptions options = Options("A");
  options.grammar_timeout_ms = 500;
  const std::unique_ptr<Engine> engine = Start(options);
  GenerateRequest plain = Request({}, 5, 30);
  plain.structured.reset();
  plain.stop.ignore_eos = true;
  const Generated usual = Generate(*engine, plain);
  const StructuredOutput valid = {.kind = Kind::kJsonSchema,
                                  .text = R"({"type":"object","properties":{"a":{"type":"boolean"}},"required":["a"]})"};
  for (const int rules : {150, 151}) {  // the second one asks a worker that was started again
    const auto bomb = std::make_shared<Collector>();
    const absl::Time begin = absl::Now();
    engine->Generate(Request({.kind = Kind::kGrammar, .text = Bomb(rules)}, 1), bomb);
    // Others go on meanwhile.
    EXPECT_EQ(Generate(*engine, plain), usual);
    EXPECT_EQ(engine->load().requests, 1) << "the grammar was compiled too soon to prove anything";
    EXPECT_EQ(bomb->Wait().finished.status(),
              absl::InvalidArgumentError(
                  "structured.grammar: takes more than 500ms of processor time to compile and to try (--grammar_timeout_ms)"));
    EXPECT_LT(absl::Now() - begin, absl::Seconds(5));
    const Generated generated = Generate(*engine, Request(valid, 3));
    ASSERT_TRUE(generated.finished.ok()) << generated.finished.status();
    if (generated.finished->reason == FinishReason::kStop) {
      EXPECT_TRUE(nlohmann::json::accept(generated.text)) << generated.text;
    }
  }
  EXPECT_EQ(Generate(*engine, plain), usual);
  ExpectNoPagesLeft(*engine);
}

// Compiled in little time, and then each mask takes several times as long as the one before.
TEST_F(StructuredTest, AnAmbiguousGrammarStallsNobody) {
  EngineOptions options = Options("A");
  options.grammar_timeout_ms = 1000;
  options.grammar_mask_timeout_ms = 50;
  const std::unique_ptr<Engine> engine = Start(options);
  const absl::Time begin = absl::Now();
  const absl::Status status = Error(*engine, {.kind = Kind::kGrammar, .text = Bomb(70)});
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  EXPECT_THAT(std::string(status.message()),
              ::testing::AnyOf(HasSubstr("(--grammar_timeout_ms)"), HasSubstr("(--grammar_mask_timeout_ms)")));
  EXPECT_LT(absl::Now() - begin, absl::Seconds(5));
  EXPECT_EQ(engine->load().steps, 0) << "the engine thread had to find out";
  EXPECT_EQ(Generate(*engine, Request({.kind = Kind::kRegex, .text = "[xy]"}, 1)).text.size(), 1u);
  // Ambiguous, and yet followed at ease.
  EXPECT_TRUE(Error(*engine, {.kind = Kind::kGrammar, .text = "root ::= root root | \"a\""}).ok());
  ExpectNoPagesLeft(*engine);
}

}  // namespace
}  // namespace memserve::engine
