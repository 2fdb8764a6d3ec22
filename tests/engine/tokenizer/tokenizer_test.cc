#include "engine/tokenizer/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "engine/tokenizer/utf8.h"
#include "nlohmann/json.hpp"

namespace memserve::engine {
namespace {

using ::testing::HasSubstr;

std::string Golden(const std::string& rest) { return std::string(MEMSERVE_GOLDEN_DIR) + "/" + rest; }

nlohmann::json Cases(const std::string& name) {
  std::ifstream file(Golden(name + "/expected.json"));
  return nlohmann::json::parse(file).at("tokenizer").at("cases");
}

class GoldenTokenizerTest : public ::testing::TestWithParam<const char*> {};

// ids = BOS + ids(text) + EOS, as the original tokenizers give them.
TEST_P(GoldenTokenizerTest, EncodesAndDecodesAsTheOriginal) {
  const std::string name = GetParam();
  const std::unique_ptr<Tokenizer> tokenizer = name == "F"   ? LoadSentencePiece(Golden("F/checkpoint/tokenizer.model")).value()
                                               : name == "H" ? LoadTiktoken(Golden("H/checkpoint/tokenizer.model")).value()
                                                             : NewByteTokenizer();
  int encoded = 0;
  int decoded = 0;
  for (const nlohmann::json& entry : Cases(GetParam())) {
    const auto ids = entry.at("ids").get<std::vector<int32_t>>();
    if (entry.at("text").is_string()) {
      std::vector<int32_t> found = tokenizer->Encode(entry.at("text")).value();
      found.insert(found.begin(), *tokenizer->bos_id());
      found.push_back(*tokenizer->eos_id());
      EXPECT_EQ(found, ids) << entry.dump();
      ++encoded;
    }
    const std::string text = tokenizer->Decode(ids, /*keep_special=*/false);
    if (text.find("\xef\xbf\xbd") == std::string::npos && entry.at("text").is_string()) {
      EXPECT_EQ(text, entry.at("decoded_without_special").get<std::string>()) << entry.dump();
      ++decoded;
    }
  }
  EXPECT_GT(encoded, 5);
  EXPECT_GT(decoded, 5);
}

INSTANTIATE_TEST_SUITE_P(Cases, GoldenTokenizerTest, ::testing::Values("A", "F", "H"));

TEST(TokenizerTest, TheBytesOfTokensJoinToTheText) {
  const std::unique_ptr<Tokenizer> tokenizer = LoadSentencePiece(Golden("F/checkpoint/tokenizer.model")).value();
  for (const std::string& text : {std::string("The keeper of the harbour"), std::string("naïve — 東京 🙂"), std::string("a\nb\tc"), std::string("  two  spaces ")}) {
    const std::vector<int32_t> ids = tokenizer->Encode(text).value();
    std::string joined;
    for (const int32_t id : ids) joined += tokenizer->TokenBytes(id);
    EXPECT_EQ(joined, " " + text);
    EXPECT_EQ(tokenizer->Decode(ids, false), text);
  }
  EXPECT_EQ(tokenizer->TokenBytes(*tokenizer->eos_id()), "");
  EXPECT_EQ(tokenizer->TokenBytes(1 << 20), "");
  EXPECT_TRUE(tokenizer->IsSpecial(1 << 20));
}

TEST(TokenizerTest, FilesThatAreNoModelsGiveOneLine) {
  const std::string path = ::testing::TempDir() + "/tokenizer.model";
  for (const std::string& content : {std::string(), std::string("not a model"), std::string(5000, '\xff')}) {
    std::ofstream(path, std::ios::binary) << content;
    const absl::Status status = LoadSentencePiece(path).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr(path));
  }
  EXPECT_EQ(LoadSentencePiece("/nowhere/tokenizer.model").status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(LoadTokenizer(Golden("F/checkpoint"), "sentencepiece", 100).status().message()),
              HasSubstr("the tokenizer has 300 tokens; config.json gives the model vocab_size 100"));
}

}  // namespace
}  // namespace memserve::engine
