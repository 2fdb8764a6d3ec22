#include "engine/model/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "nlohmann/json.hpp"

namespace memserve::engine {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

json Valid() {
  return {{"model_type", "memory_llama"},
          {"dim", 64},
          {"n_layers", 6},
          {"n_heads", 4},
          {"vocab_size", 258},
          {"max_seqlen", 256},
          {"multiple_of", 256},
          {"head_dim", nullptr},
          {"n_kv_heads", nullptr},
          {"productkey_args", {{"is_enabled", true}, {"layers", "4,1"}, {"mem_n_keys", 32}, {"mem_knn", 8}, {"mem_k_dim", 32}}}};
}

std::string Error(const json& document) { return std::string(ParseModelConfig(document.dump(), "config.json").status().message()); }

TEST(ModelConfigTest, ReadsTheOriginalsNamesAndDefaults) {
  const ModelConfig config = ParseModelConfig(Valid().dump(), "config.json").value();
  EXPECT_EQ(config.head_dim, 16);
  EXPECT_EQ(config.n_kv_heads, 4);
  EXPECT_EQ(config.ffn_dim, 256);
  EXPECT_THAT(config.memory.layers, ElementsAre(1, 4));
  EXPECT_TRUE(config.IsMemoryLayer(4));
  EXPECT_FALSE(config.IsMemoryLayer(0));
  EXPECT_EQ(config.value_dim(), 64);
  EXPECT_EQ(config.memory.rows(), 1024);
}

TEST(ModelConfigTest, TheFeedForwardIsAsWideAsTheOriginals) {
  const auto width = [](int dim, int multiple_of, json multiplier) {
    json document = Valid();
    document["dim"] = dim;
    document["multiple_of"] = multiple_of;
    document["ffn_dim_multiplier"] = multiplier;
    return ParseModelConfig(document.dump(), "config.json").value().ffn_dim;
  };
  EXPECT_EQ(width(4096, 256, nullptr), 11008);  // Llama 2 7B
  EXPECT_EQ(width(4096, 1024, 1.3), 14336);     // Llama 3 8B
  EXPECT_EQ(width(8192, 4096, 1.3), 28672);     // Llama 2 and 3 70B
  EXPECT_EQ(width(56, 32, nullptr), 160);
}

TEST(ModelConfigTest, MemoryThatIsNotEnabledLeavesADenseModel) {
  json document = Valid();
  document["productkey_args"]["is_enabled"] = false;
  EXPECT_TRUE(ParseModelConfig(document.dump(), "config.json").value().memory.layers.empty());
}

TEST(ModelConfigTest, ErrorsNameFileKeyValueAndLimit) {
  const auto with = [](const std::string& key, const json& value) {
    json document = Valid();
    document[json::json_pointer("/" + key)] = value;
    return Error(document);
  };
  EXPECT_EQ(with("dim", 0), "config.json: dim is 0; it must be in [1, 1048576]");
  EXPECT_EQ(with("dim", 1e3), "config.json: dim is 1000.0; it must be an integer");
  EXPECT_EQ(with("dim", 18446744073709551615u), "config.json: dim is 18446744073709551615; it must be in [1, 1048576]");
  EXPECT_EQ(with("dim", nullptr), "config.json: dim is missing");
  EXPECT_EQ(with("norm_eps", "x"), "config.json: norm_eps is \"x\"; it must be a number in [0, 1]");
  EXPECT_EQ(with("n_kv_heads", 3), "config.json: n_kv_heads is 3; it must divide n_heads, 4");
  EXPECT_EQ(with("head_dim", 15), "config.json: head_dim is 15; rotary positions need an even one");
  EXPECT_EQ(with("model_type", "gpt2"),
            "config.json: model_type is 'gpt2'; this server reads memory_llama, llama, mistral, qwen2, qwen3");
  EXPECT_EQ(with("productkey_args/layers", "1,6"),
            "config.json: productkey_args: productkey_args.layers has '6'; the model has layers 0 to 5");
  EXPECT_EQ(with("productkey_args/layers", "1,1"),
            "config.json: productkey_args: productkey_args.layers is '1,1'; it names a layer twice");
  EXPECT_EQ(with("productkey_args/mem_knn", 33),
            "config.json: productkey_args: mem_knn is 33; there are only 32 half keys (mem_n_keys)");
  EXPECT_EQ(with("productkey_args/mem_k_dim", 31), "config.json: productkey_args: mem_k_dim is 31; it must be even");
  EXPECT_THAT(with("productkey_args/mem_n_keys", 46341), HasSubstr("mem_n_keys is 46341; it must be in [1, 46340]"));
  EXPECT_EQ(with("productkey_args", 7), "config.json: productkey_args is 7; it must be an object");
}

TEST(ModelConfigTest, TextThatIsNoConfigurationGivesOneLine) {
  const auto error = [](const std::string& text) { return std::string(ParseModelConfig(text, "config.json").status().message()); };
  EXPECT_THAT(error(""), HasSubstr("config.json: is not JSON"));
  EXPECT_THAT(error("[1]"), HasSubstr("config.json: is not a JSON object"));
  EXPECT_THAT(error("{\"dim\": 1, \"dim\": 2}"), HasSubstr("has the key 'dim' twice"));
  std::string deep = "1";
  for (int i = 0; i < 100000; ++i) deep = "[" + deep + "]";
  EXPECT_THAT(error("{\"a\": " + deep + "}"), HasSubstr("levels deep"));
}

TEST(GenerationConfigTest, ReadsDefaultsAndNamesErrors) {
  const GenerationConfig config =
      ParseGenerationConfig(R"({"max_new_tokens": 9, "temperature": 0.5, "eos_token_id": [2, 7], "other": 1})", "g.json").value();
  EXPECT_EQ(config.max_new_tokens, 9);
  EXPECT_EQ(config.temperature, 0.5f);
  EXPECT_THAT(config.eos_token_ids, ElementsAre(2, 7));
  EXPECT_FALSE(config.top_p.has_value());
  EXPECT_FALSE(ParseGenerationConfig(R"({"temperature": -1})", "g.json").ok());
  EXPECT_FALSE(ParseGenerationConfig(R"({"eos_token_id": ["x"]})", "g.json").ok());
}

}  // namespace
}  // namespace memserve::engine
