// tokenizer.json and rank files: the same ids as the packages give, and one line for files that are wrong.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <random>

#include "absl/strings/escaping.h"
#include "engine/tokenizer/tokenizer.h"
#include "engine/tokenizer/utf8.h"
#include "nlohmann/json.hpp"

namespace memserve::engine {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

const std::string kFolder = std::string(MEMSERVE_GOLDEN_DIR) + "/../engine/tokenizer/parity/";

std::string ReadAll(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const std::string& kind, const std::string& path) {
  return kind == "bpe" ? LoadBpe(path) : kind == "tiktoken" ? LoadTiktoken(path) : LoadSentencePiece(path);
}

std::unique_ptr<Tokenizer> LoadFixture(const std::string& name) {
  const json cases = json::parse(ReadAll(kFolder + name + ".cases.json"));
  return Load(cases.at("kind"), kFolder + cases.at("file").get<std::string>()).value();
}

class PackageTest : public ::testing::TestWithParam<const char*> {};

TEST_P(PackageTest, GivesWhatThePackageGives) {
  const json cases = json::parse(ReadAll(kFolder + GetParam() + ".cases.json"));
  const std::unique_ptr<Tokenizer> tokenizer = LoadFixture(GetParam());
  int compared = 0;
  for (const char* kind : {"encode", "encode_special"}) {
    for (const json& entry : cases.at(kind)) {
      const EncodeOptions options = {.allow_special = kind == std::string("encode_special")};
      EXPECT_EQ(tokenizer->Encode(entry[0], options).value(), entry[1].get<std::vector<int32_t>>()) << kind << " " << entry[0];
      ++compared;
    }
  }
  for (const json& entry : cases.at("decode")) {
    EXPECT_EQ(tokenizer->Decode(entry[0].get<std::vector<int32_t>>(), false), entry[1].get<std::string>()) << entry[0];
    ++compared;
  }
  EXPECT_GE(compared, 50);
}

// Whatever the ids are: increments are whole characters and join to the text of the whole.
TEST_P(PackageTest, IncrementsJoinToTheWholeText) {
  const std::unique_ptr<Tokenizer> tokenizer = LoadFixture(GetParam());
  std::mt19937 random(5);
  for (int round = 0; round < 1500; ++round) {
    std::vector<int32_t> ids;
    // Half of the rounds stay among the bytes, where characters break apart; some ids are beyond the vocabulary.
    const int range = round % 2 == 0 ? tokenizer->vocab_size() + 5 : std::min(262, tokenizer->vocab_size());
    for (size_t i = random() % 24; i > 0; --i) ids.push_back(static_cast<int32_t>(random() % range));
    const bool keep_special = round % 3 == 0;
    Detokenizer detokenizer(*tokenizer, /*at_start=*/true, keep_special);
    std::string joined;
    for (const int32_t id : ids) {
      const std::string increment = detokenizer.Append(id);
      EXPECT_EQ(FindBrokenUtf8(increment), std::string::npos) << json(ids);
      joined += increment;
      EXPECT_TRUE(tokenizer->Decode(ids, keep_special).starts_with(joined)) << "what was given must stay: " << json(ids);
    }
    joined += detokenizer.Finish();
    EXPECT_EQ(joined, tokenizer->Decode(ids, keep_special)) << json(ids);
  }
}

INSTANTIATE_TEST_SUITE_P(Packages, PackageTest,
                         ::testing::Values("gpt2", "llama3", "qwen2", "smollm2", "llama2", "mistral", "split_previous",
                                           "split_next", "tiktoken", "sp_bpe", "sp_unigram"));

TEST(BpeTest, NamesOfSpecialTokensAreTextUnlessAllowed) {
  const std::unique_ptr<Tokenizer> tokenizer = LoadFixture("qwen2");
  const std::string text = "a<|im_end|>b<|im_end|>";
  const std::vector<int32_t> as_text = tokenizer->Encode(text).value();
  const auto specials = [&](const std::vector<int32_t>& ids) {
    return std::count_if(ids.begin(), ids.end(), [&](int32_t id) { return tokenizer->IsSpecial(id); });
  };
  EXPECT_EQ(specials(as_text), 0);
  EXPECT_EQ(tokenizer->Decode(as_text, false), text);
  EXPECT_EQ(specials(tokenizer->Encode(text, {.allow_special = true}).value()), 2);
  // The first is a user's: text, even where it only touches what the user wrote.
  EXPECT_EQ(specials(tokenizer->Encode(text, {.allow_special = true, .literal = {{1, 11}}}).value()), 1);
  EXPECT_EQ(specials(tokenizer->Encode(text, {.allow_special = true, .literal = {{0, 2}, {21, 22}}}).value()), 0);
  EXPECT_EQ(tokenizer->Decode(tokenizer->Encode(text, {.allow_special = true}).value(), true), text);
}

TEST(BpeTest, LongRunsTakeNoLongerThanTheirLength) {
  for (const char* name : {"gpt2", "llama3", "llama2", "tiktoken"}) {
    const std::unique_ptr<Tokenizer> tokenizer = LoadFixture(name);
    for (const std::string& piece :
         {std::string(" "), std::string("a"), std::string("\n "), std::string("é"), std::string("1"), std::string("<")}) {
      std::string text;
      // One takes what a request may have at most.
      while (text.size() < (name == std::string("gpt2") && piece == " " ? 1 << 20 : 1 << 17)) text += piece;
      const auto begin = std::chrono::steady_clock::now();
      const std::vector<int32_t> ids = tokenizer->Encode(text).value();
      // A fraction of a second in a release build; what is quadratic takes hours.
      EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(20)) << name << " '" << piece << "'";
      EXPECT_EQ(tokenizer->Decode(ids, false), text) << name << " '" << piece << "'";
    }
  }
}

TEST(BpeTest, TextThatIsNoUtf8IsRefused) {
  EXPECT_EQ(LoadFixture("gpt2")->Encode("ab\xff").status().message(), "text: is not UTF-8 at byte 2");
  EXPECT_EQ(LoadFixture("tiktoken")->Encode("12345678\xc3").status().message(), "text: is not UTF-8 at byte 8");
}

// --- files that are wrong

std::string ErrorOf(const std::string& name, const std::string& content) {
  const std::string folder = ::testing::TempDir() + "/wrong_tokenizer";
  std::filesystem::create_directories(folder);
  const std::string path = folder + "/" + name;
  std::ofstream(path, std::ios::binary) << content;
  const absl::Status status = name == "tokenizer.json" ? LoadBpe(path).status() : LoadTiktoken(path).status();
  EXPECT_THAT(std::string(status.message()), HasSubstr(path)) << "the file is named";
  EXPECT_EQ(std::string(status.message()).find('\n'), std::string::npos) << status;
  EXPECT_LT(status.message().size(), 700u);
  return std::string(status.message()).substr(std::min(status.message().size(), path.size() + 2));
}

json SmallTokenizer() {
  return json::parse(R"({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
                         "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false}, "decoder": {"type": "ByteLevel"},
                         "added_tokens": [{"id": 3, "content": "<s>", "special": true}]})");
}

// Like merge_patch, but paths are pointers.
std::string With(const std::string& pointer, const std::string& value) {
  json tokenizer = SmallTokenizer();
  tokenizer[json::json_pointer(pointer)] = json::parse(value);
  return tokenizer.dump();
}

TEST(BpeTest, TheSmallTokenizerOfTheseTestsIsRight) {
  const std::string path = ::testing::TempDir() + "/right_tokenizer.json";
  std::ofstream(path) << SmallTokenizer();
  const std::unique_ptr<Tokenizer> tokenizer = LoadBpe(path).value();
  EXPECT_EQ(tokenizer->Encode("abba").value(), (std::vector<int32_t>{2, 1, 0}));
  EXPECT_EQ(tokenizer->vocab_size(), 4);
}

TEST(BpeTest, WrongTokenizerFilesGiveOneLine) {
  const std::pair<std::string, std::string> cases[] = {
      {"", "is not JSON: it breaks off or is wrong at byte 1"},
      {"[1]", "is not a JSON object"},
      {R"({"model": {"vocab": {"a": 0)", "is not JSON: it breaks off or is wrong at byte 28"},
      {"{}", "decoder: is not an object"},
      {With("/decoder", R"({"type": "CTC"})"),
       "decoder: type is 'CTC'; known are ByteLevel, ByteFallback, Fuse, Metaspace, Replace, Strip, Sequence"},
      {With("/normalizer", R"({"type": "Nmt"})"),
       "normalizer: type is 'Nmt'; known are NFC, NFD, NFKC, NFKD, Lowercase, Prepend, Replace, Strip, Sequence"},
      {With("/pre_tokenizer", R"({"type": "Bert"})"),
       "pre_tokenizer: type is 'Bert'; known are ByteLevel, Digits, Metaspace, Split, Sequence"},
      {With("/pre_tokenizer", R"({"type": "Split", "pattern": {"Regex": "(a"}, "behavior": "Isolated"})"),
       "pre_tokenizer: the pattern '(a' is wrong: missing closing parenthesis"},
      {With("/post_processor", R"({"type": "Other"})"),
       "post_processor: type is 'Other'; known are TemplateProcessing, ByteLevel, Sequence"},
      {With("/model/type", R"("Unigram")"), "model: type is 'Unigram'; known is BPE"},
      {With("/model/vocab", "{}"), "model.vocab has no tokens"},
      {With("/model/vocab/a", "-1"), "model.vocab gives 'a' the id -1; it must be in [0, 2147483647]"},
      {With("/model/vocab/a", "99999999999"), "model.vocab gives 'a' the id 99999999999; it must be in [0, 2147483647]"},
      {With("/model/vocab/a", "1000000000"), "model.vocab gives 'a' the id 1000000000; at most 16777215 is accepted"},
      {With("/model/vocab/a", "10000000"), "model.vocab has 3 tokens and an id of 10000000"},
      {With("/model/vocab/a", "1"), "model.vocab gives the id 1 twice, once to 'b'"},
      {With("/model/vocab/a", "\"x\""), "model.vocab has a value of the wrong kind, \"x\""},
      {R"({"model": {"vocab": {"a": 0, "a": 1}}, "decoder": {"type": "ByteLevel"}})", "model.vocab has 'a' twice"},
      {R"({"model": 1, "model": 2})", "has the key 'model' twice"},
      {With("/model/merges", R"(["a b c"])"), "model.merges has 'a b c'; it must be two tokens with a space between"},
      {With("/model/merges", R"([["a"]])"), "model.merges has an entry that is not two strings"},
      {With("/model/merges", R"(["b a"])"), "model.merges joins 'b' and 'a' at rank 0; model.vocab lacks 'ba'"},
      {With("/model/merges", R"(["a z"])"), "model.merges joins 'a' and 'z' at rank 0; model.vocab lacks 'z'"},
      {With("/model/merges", R"([{}])"), "model.merges has an object inside"},
      {With("/model/dropout", "0.1"), "model: dropout is set; encoding would be left to chance"},
      {With("/model/unk_token", R"("<unk>")"), "model.unk_token is '<unk>', which model.vocab lacks"},
      {With("/added_tokens/0/id", "-3"), "added_tokens: id is -3; it must be an integer in [0, 16777215]"},
      {With("/added_tokens/0/id", "16777000"), "added_tokens gives '<s>' the id 16777000; there are 3 tokens before it"},
      {With("/added_tokens/0/content", R"("a")"), "added_tokens gives 'a' the id 3; it has 0"},
      {With("/added_tokens", "3"), "added_tokens is not an array"},
      {std::string(100, '['), "is nested more than 32 levels deep"},
  };
  for (const auto& [content, message] : cases) {
    EXPECT_EQ(ErrorOf("tokenizer.json", content), message) << content.substr(0, 300);
  }
}

TEST(BpeTest, PatternsThatBlowUpAreStopped) {
  for (const char* pattern : {"(a+)+$", "(a|a|b)*c", "(.*)*(.*)*(.*)*x"}) {
    json tokenizer = SmallTokenizer();
    tokenizer["pre_tokenizer"] = {
        {"type", "Sequence"},
        {"pretokenizers",
         {{{"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", "Isolated"}, {"invert", false}},
          {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}}}}};
    const std::string path = ::testing::TempDir() + "/pattern_tokenizer.json";
    std::ofstream(path) << tokenizer;
    const auto begin = std::chrono::steady_clock::now();
    const auto ids = LoadBpe(path).value()->Encode(std::string(200, 'a') + "d");
    EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(60)) << pattern;
    if (ids.ok()) continue;
    EXPECT_THAT(std::string(ids.status().message()), HasSubstr("text: the tokenizer's pattern"));
  }
}

TEST(TiktokenTest, WrongRankFilesGiveOneLine) {
  std::string bytes;
  for (int byte = 0; byte < 256; ++byte)
    bytes += absl::Base64Escape(std::string(1, static_cast<char>(byte))) + " " + std::to_string(byte) + "\n";
  const std::pair<std::string, std::string> cases[] = {
      {"", "has no ranks"},
      {"IQ== 0\n", "has no token for the byte 0"},
      {"IQ==\n", "line 1 is not 'base64 rank'"},
      {"I!== 0\n", "line 1 is not 'base64 rank'"},
      {"IQ== 1\n", "line 1 has rank 1; ranks go up from 0 one by one, so it must be 0"},
      {"IQ== 99999999999999999999\n", "line 1 is not 'base64 rank'"},
      {" 0\n", "line 1 has a token of 0 bytes; 1 to 1024 are accepted"},
      {bytes + "IQ== 256\n", "line 257 has the token of an earlier line"},
      {bytes + absl::Base64Escape(std::string(2000, 'a')) + " 256\n", "line 257 has a token of 2000 bytes; 1 to 1024 are accepted"},
  };
  for (const auto& [content, message] : cases) {
    EXPECT_EQ(ErrorOf("tokenizer.model", content), message);
  }
}

// Bytes of real files changed at random: a tokenizer that works or an error, never a crash.
TEST(BpeTest, MutatedFilesGiveATokenizerOrAnError) {
  std::mt19937 random(11);
  const std::string path = ::testing::TempDir() + "/mutated_tokenizer";
  int loaded = 0;
  constexpr std::string_view kPieces[] = {"{",    "}",  "[",          "]",       "\"",       ",",         ":",
                                          "null", "-1", "4294967296", "\\u0000", "\"type\"", "Metaspace", "99"};
  for (int round = 0; round < 900; ++round) {
    const char* names[] = {"qwen2.json", "llama2.json", "split_next.json", "mistral.json", "tiktoken.model"};
    const std::string name = names[round % 5];
    const bool is_json = name.ends_with(".json");
    static std::map<std::string, std::string> originals;
    std::string& original = originals[name];
    if (original.empty()) {
      original = ReadAll(kFolder + name);
      if (is_json) {  // short, so that changes hit what is not vocabulary
        json file = json::parse(original);
        file["model"]["merges"] = json::array();
        original = file.dump();
      }
    }
    std::string content = original;
    for (int change = 0; change < 1 + round % 3; ++change) {
      const size_t at = random() % 2 == 0 ? random() % std::min<size_t>(content.size(), 3000) : random() % content.size();
      const size_t size = std::min<size_t>(1 + random() % 20, content.size() - at);
      switch (random() % 5) {
        case 0:
          content.erase(at, size);
          break;
        case 1:
          content.insert(at, content.substr(random() % content.size(), size));
          break;
        case 2:
          content.insert(at, kPieces[random() % std::size(kPieces)]);
          break;
        case 3:
          content.resize(std::max<size_t>(1, content.size() - random() % 200));
          break;
        default:
          content[at] = static_cast<char>(random());
          break;
      }
    }
    std::ofstream(path, std::ios::binary | std::ios::trunc) << content;
    const auto tokenizer = Load(is_json ? "bpe" : "tiktoken", path);
    if (!tokenizer.ok()) {
      EXPECT_EQ(std::string(tokenizer.status().message()).find('\n'), std::string::npos) << tokenizer.status();
      continue;
    }
    ++loaded;
    const auto ids = (*tokenizer)->Encode("The naïve 東京 🙂 <s> text  12\n\n", {.allow_special = true});
    if (ids.ok()) (*tokenizer)->Decode(*ids, true);
  }
  EXPECT_GT(loaded, 50);
  EXPECT_LT(loaded, 890);
}

TEST(LoadTokenizerTest, ChoosesByTheFilesWhereNothingIsSaid) {
  const std::string folder = ::testing::TempDir() + "/choose_tokenizer";
  std::filesystem::remove_all(folder);
  std::filesystem::create_directories(folder);
  EXPECT_EQ(LoadTokenizer(folder, "", 100000).value(), nullptr);
  std::filesystem::copy_file(kFolder + "tiktoken.model", folder + "/tokenizer.model");
  EXPECT_EQ(LoadTokenizer(folder, "", 100000).value()->name(), "tiktoken");
  std::filesystem::copy_file(kFolder + "sp_bpe.model", folder + "/tokenizer.model",
                             std::filesystem::copy_options::overwrite_existing);
  EXPECT_EQ(LoadTokenizer(folder, "", 100000).value()->name(), "sentencepiece");
  std::filesystem::copy_file(kFolder + "llama2.json", folder + "/tokenizer.json");
  EXPECT_EQ(LoadTokenizer(folder, "", 100000).value()->name(), "bpe");
  EXPECT_THAT(std::string(LoadTokenizer(folder, "", 100).status().message()),
              HasSubstr("tokens; config.json gives the model vocab_size 100"));
  std::ofstream(folder + "/tokenizer.json") << R"({"model": {"type": "Unigram", "vocab": []}, "decoder": {"type": "Fuse"}})";
  EXPECT_EQ(LoadTokenizer(folder, "", 100000).value()->name(), "sentencepiece") << "tokenizer.json is of a kind that is not known";
}

TEST(LoadTokenizerTest, EndsComeFromTheFilesBesideTokenizerJson) {
  const std::string folder = ::testing::TempDir() + "/ends_tokenizer";
  std::filesystem::remove_all(folder);
  std::filesystem::create_directories(folder);
  std::filesystem::copy_file(kFolder + "qwen2.json", folder + "/tokenizer.json");
  const auto load = [&](const std::string& config) {
    std::ofstream(folder + "/tokenizer_config.json") << config;
    return LoadBpe(folder + "/tokenizer.json").value();
  };
  auto tokenizer = load("{}");
  EXPECT_FALSE(tokenizer->adds_bos());
  EXPECT_EQ(tokenizer->SpecialName(tokenizer->eos_id().value()), "<|endoftext|>");
  tokenizer = load(R"({"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>"})");
  EXPECT_EQ(tokenizer->SpecialName(tokenizer->eos_id().value()), "<|im_end|>");
  EXPECT_EQ(tokenizer->SpecialName(tokenizer->bos_id().value()), "<|im_start|>");
  EXPECT_EQ(tokenizer->SpecialName(tokenizer->end_of_turn_id().value()), "<|im_end|>");
  EXPECT_EQ(LoadFixture("tiktoken")->SpecialName(LoadFixture("tiktoken")->end_of_turn_id().value()), "<|eot_id|>");
  EXPECT_FALSE(tokenizer->adds_bos()) << "it has one, but texts do not begin with it";
  EXPECT_TRUE(load(R"({"bos_token": "<|im_start|>", "add_bos_token": true})")->adds_bos());
  const auto llama = LoadFixture("llama2");
  EXPECT_TRUE(llama->adds_bos());
  EXPECT_EQ(llama->bos_id(), 1);
}

}  // namespace
}  // namespace memserve::engine
