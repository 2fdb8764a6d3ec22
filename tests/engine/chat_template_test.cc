#include "engine/chat_template.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <random>

#include "nlohmann/json.hpp"

namespace memserve::engine {
namespace {

using ::testing::HasSubstr;

const std::string kFolder = std::string(MEMSERVE_GOLDEN_DIR) + "/../engine/chat/";

std::string ReadAll(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

jinja::Dict Tokens() {
  jinja::Dict variables;
  for (const auto& [name, text] : {std::pair("bos_token", "<s>"), std::pair("eos_token", "</s>"), std::pair("pad_token", "<pad>"),
                                   std::pair("unk_token", "<unk>")}) {
    variables.emplace_back(name, jinja::Value::Written(text));
  }
  return variables;
}

absl::StatusOr<RenderedChat> Render(const std::string& source, const Chat& chat) {
  const auto parsed = ChatTemplate::Parse(source, "t", Tokens());
  if (!parsed.ok()) return parsed.status();
  return (*parsed)->Render(chat);
}

std::string Rendered(const std::string& source) {
  const auto rendered = Render(source, {.messages = {{"user", "Hello"}, {"assistant", "Hi"}}});
  return rendered.ok() ? rendered->text : std::string(rendered.status().message());
}

class ChatTemplateFileTest : public ::testing::TestWithParam<const char*> {};

TEST_P(ChatTemplateFileTest, RendersAsTransformersDoes) {
  const std::string source = ReadAll(kFolder + GetParam() + ".jinja");
  int compared = 0;
  int refused = 0;
  for (const nlohmann::json& entry : nlohmann::json::parse(ReadAll(kFolder + GetParam() + ".cases.json"))) {
    Chat chat = {.add_generation_prompt = entry.at("add_generation_prompt")};
    for (const nlohmann::json& message : entry.at("messages")) chat.messages.push_back({message.at("role"), message.at("content")});
    const auto rendered = Render(source, chat);
    if (entry.at("expected").is_null()) {
      EXPECT_EQ(rendered.status().code(), absl::StatusCode::kInvalidArgument);
      ++refused;
      continue;
    }
    ASSERT_TRUE(rendered.ok()) << rendered.status();
    EXPECT_EQ(rendered->text, entry.at("expected").get<std::string>());
    ++compared;
  }
  EXPECT_GE(compared, 10);
  EXPECT_EQ(compared + refused, 22);
}

INSTANTIATE_TEST_SUITE_P(Families, ChatTemplateFileTest,
                         ::testing::Values("chatml", "llama-2", "llama-3", "mistral", "qwen2", "qwen2.5", "qwen3", "smollm2",
                                           "zephyr"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::erase_if(name, [](char c) { return c == '-' || c == '.'; });
                           return name;
                         });

// What follows is as Python's jinja2 has it, unless it says otherwise.
TEST(ChatTemplateTest, ComputesAsPythonDoes) {
  EXPECT_EQ(Rendered("{{ 7 // 2 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 7 / 2 }} {{ 2 + 3 * 4 }} {{ 1 ~ 2 + 3 if false else 'x' }}"),
            "3 -4 2 3.5 14 x");
  EXPECT_EQ(Rendered("{{ 'naïve'[2] }}{{ 'naïve'[::-1] }}{{ 'naïve'[-3:] }}{{ 'naïve'|length }}"), "ïevïanïve5");
  EXPECT_EQ(Rendered("{{ [1, 2, 3][1:] }}{{ {'a': none, 'b': [true, 'x']} }}"), "[2, 3]{'a': None, 'b': [True, 'x']}");
  EXPECT_EQ(Rendered("{{ ' a b '.split() }}{{ 'a,b,c'.split(',', 1) }}{{ 'a,b,c'.rsplit(',', 1) }}"),
            "['a', 'b']['a', 'b,c']['a,b', 'c']");
  EXPECT_EQ(Rendered("{{ {'a': 1, 'b': \"x\\n\"}|tojson }}{{ [1]|tojson(indent=2) }}"), "{\"a\": 1, \"b\": \"x\\n\"}[\n  1\n]");
  EXPECT_EQ(Rendered("{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ loop.last }}{{ m.content }}{% endfor %}"),
            "1TrueHello");
  EXPECT_EQ(Rendered("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"), "2");
  EXPECT_EQ(Rendered("{% set x = 1 %}{% for m in messages %}{% set x = 2 %}{% endfor %}{{ x }}"), "1");
  EXPECT_EQ(Rendered("{% macro f(a, b='B') %}{{ a }}{{ b }}{% endmacro %}{{ f('1') }}{{ f('2', b='C') }}"), "1B2C");
  EXPECT_EQ(Rendered("{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i "
                     "}}{% endfor %}"),
            "02");
  EXPECT_EQ(
      Rendered("{{ x is defined }}{{ x is not defined }}{{ 3 is odd }}{{ 'a' in 'cat' }}{{ 1 not in [2] }}{{ x|default('d') }}"),
      "FalseTrueTrueTrueTrued");
  EXPECT_EQ(
      Rendered("{{ messages|map(attribute='role')|join(',') }}{{ messages|selectattr('role', 'equalto', 'user')|list|length }}"),
      "user,assistant1");
  EXPECT_EQ(Rendered("  {%- if true %}\n a\n  {% endif %}\n b {# c #}\n"), " a\n b ");
  EXPECT_EQ(Rendered("{% raw %}{{ x }}{% endraw %}"), "{{ x }}");
}

TEST(ChatTemplateTest, WhatIsWrongGivesOneLineWithItsPlace) {
  EXPECT_EQ(Rendered("a\n{% if x %}"), "t: line 2: endif is missing");
  EXPECT_EQ(Rendered("{{ x"), "t: line 1: a tag is not closed; }} is missing");
  EXPECT_EQ(Rendered("{% include 'x' %}"),
            "t: line 1: the statement 'include' is not known; known are if, for, set, macro, break, continue, raw, generation");
  EXPECT_EQ(Rendered("\n\n{{ f(1) }}"), "chat: the template, line 3: 'f' is not known");
  EXPECT_EQ(Rendered("{{ x.y.z }}"), "chat: the template, line 1: 'y' is asked of something undefined");
  EXPECT_EQ(Rendered("{{ raise_exception('no ' ~ messages[0].role) }}"),
            "chat: the template, line 1: the template refuses it: no user");
  EXPECT_EQ(Rendered("{{ 'a'|nosuch }}"), "chat: the template, line 1: the filter 'nosuch' is not known");
}

// Each would take for ever, all memory or the stack.
TEST(ChatTemplateTest, HostileTemplatesEndSoon) {
  const auto begin = std::chrono::steady_clock::now();
  std::string nested_lists =
      "{% set ns = namespace(x=[]) %}{% for i in range(100000) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}";
  for (const std::string& source : {
           std::string("{% for a in range(100000) %}{% for b in range(100000) %}{{ a }}{% endfor %}{% endfor %}"),
           std::string("{{ 'x' * 1000000000000 }}"),
           std::string("{{ range(1000000000) }}"),
           std::string("{% set ns = namespace(x='x') %}{% for i in range(100) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"),
           std::string("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
           std::string("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}"),
           nested_lists,
           std::string("{% set ns = namespace() %}{% set ns.x = ns %}"),
           std::string(
               "{% set ns = namespace(x=[1]) %}{% for i in range(50) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x|tojson }}"),
           std::string("{% set ns = namespace(x=[1]) %}{% for i in range(50) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x == "
                       "ns.x }}{{ [] ~ ns.x }}"),
           std::string("{% set ns = namespace(x=[1]) %}{% for i in range(50) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"),
           std::string(
               "{% for i in range(99999) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' * 10000 }}{% endfor %}"),
           std::string("{{ ('a' * 5000000).replace('a', 'b' * 1000) }}"),
           std::string("{{ ('a' * 5000000)|list|join('b' * 1000) }}"),
           std::string("{{ 9223372036854775807 * 9223372036854775807 }}"),
           std::string("{{ (0 - 9223372036854775807 - 1) // -1 }}"),
           "{{ " + std::string(100000, '(') + " }}",
           "{{ " + std::string(100000, '-') + "1 }}",
           "{{ 1" +
               [] {
                 std::string sum;
                 for (int i = 0; i < 100000; ++i) sum += " + 1";
                 return sum;
               }() +
               " }}",
           "{{ x" +
               [] {
                 std::string path;
                 for (int i = 0; i < 100000; ++i) path += ".y";
                 return path;
               }() +
               " }}",
           [] {
             std::string blocks;
             for (int i = 0; i < 50000; ++i) blocks += "{% if x %}";
             return blocks;
           }(),
           std::string(2 << 20, 'x'),
       }) {
    const auto rendered = Render(source, {.messages = {{"user", "Hello"}}});
    EXPECT_FALSE(rendered.ok()) << source.substr(0, 100);
    EXPECT_LT(rendered.status().message().size(), 400u);
    EXPECT_EQ(std::string(rendered.status().message()).find('\n'), std::string::npos);
  }
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(120));
}

TEST(ChatTemplateTest, KnowsWhatTheMessagesWrote) {
  const auto spans = [](const std::string& source, const std::string& content) {
    const RenderedChat rendered = Render(source, {.messages = {{"user", content}, {"hacker", "y"}}}).value();
    std::string marked;
    size_t at = 0;
    for (const TextSpan& span : rendered.from_messages) {
      marked += rendered.text.substr(at, span.begin - at) + "{" + rendered.text.substr(span.begin, span.end - span.begin) + "}";
      at = span.end;
    }
    return marked + rendered.text.substr(at);
  };
  EXPECT_EQ(spans("<u>{{ messages[0].content }}</u>", "a"), "<u>{a}</u>");
  EXPECT_EQ(spans("<u>{{ messages[0].content|trim|upper }}</u>", " a "), "<u>{A}</u>");
  EXPECT_EQ(spans("{{ messages[0].content.split('|')[0] }}{{ messages[0].content.split('|')|join('-') }}", "a|b"), "{aa}-{b}");
  EXPECT_EQ(spans("{{ messages[0].content.replace('a', '<x>') }}", "bab"), "{b}<x>{b}");
  EXPECT_EQ(spans("{{ messages[0].content[1:3] ~ messages[0].content[0] }}", "abcd"), "{bca}");
  EXPECT_EQ(spans("{{ messages[0].content|tojson }}", "a\"b"), "\"{a\\\"b}\"");
  EXPECT_EQ(spans("{% for c in messages[0].content %}{{ c }},{% endfor %}", "ab"), "{a},{b},");
  EXPECT_EQ(spans("{% set x %}<{{ messages[0].content }}>{% endset %}{{ x }}", "a"), "<{a}>");
  EXPECT_EQ(spans("{{ messages[0].role }}{{ messages[1].role }}", "a"), "user{hacker}")
      << "a role that is not known is as untrusted";
  EXPECT_EQ(spans("{{ [messages[0].content] }}", "a"), "['{a}']");
}

// Bytes of real templates changed at random: text or an error, never a crash.
TEST(ChatTemplateTest, MutatedTemplatesGiveTextOrAnError) {
  std::mt19937 random(7);
  std::vector<std::string> sources;
  for (const auto& entry : std::filesystem::directory_iterator(kFolder)) {
    if (entry.path().extension() == ".jinja") sources.push_back(ReadAll(entry.path()));
  }
  std::sort(sources.begin(), sources.end());
  ASSERT_GE(sources.size(), 9u);
  int rendered = 0;
  constexpr std::string_view kPieces[] = {"{{", "}}", "{%",       "%}",    "-",    "(",     ")",    "[",        "]", "'", "|",
                                          ".",  "*",  "99999999", " for ", " if ", "endif", "loop", "messages", ":", ",", "~"};
  for (int round = 0; round < 3000; ++round) {
    std::string source = sources[random() % sources.size()];
    for (int change = 0; change < 1 + round % 4; ++change) {
      const size_t at = random() % source.size();
      const size_t size = std::min<size_t>(1 + random() % 12, source.size() - at);
      switch (random() % 4) {
        case 0:
          source.erase(at, size);
          break;
        case 1:
          source.insert(at, source.substr(random() % source.size(), 1 + random() % 30));
          break;
        case 2:
          source.insert(at, kPieces[random() % std::size(kPieces)]);
          break;
        default:
          source[at] = static_cast<char>(random());
          break;
      }
      if (source.empty()) source = "x";
    }
    const auto result = Render(source, {.messages = {{"system", "s"}, {"user", "Hello"}, {"assistant", "Hi"}, {"user", "Go"}}});
    rendered += result.ok();
  }
  EXPECT_GT(rendered, 300);
  EXPECT_LT(rendered, 2900);
}

}  // namespace
}  // namespace memserve::engine
