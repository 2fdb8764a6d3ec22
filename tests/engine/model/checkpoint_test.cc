// Checkpoint files that are wrong: one clear line each, and never a crash.

#include "engine/model/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>

#include "engine/engine.h"
#include "tests/support/golden.h"

namespace memserve::engine {
namespace {

using ::testing::ContainsRegex;
using ::testing::HasSubstr;

// A folder that goes away.
class TempFolder {
 public:
  TempFolder() {
    std::string name = ::testing::TempDir() + "/checkpoint-XXXXXX";
    path_ = mkdtemp(name.data());
  }
  ~TempFolder() { std::filesystem::remove_all(path_); }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

void Write(const std::string& path, const std::string& content) { std::ofstream(path, std::ios::binary) << content; }

std::string ReadAll(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

std::string Safetensors(const std::string& header, const std::string& data) {
  const uint64_t length = header.size();
  return std::string(reinterpret_cast<const char*>(&length), 8) + header + data;
}

absl::Status OpenStatus(const std::string& content) {
  const TempFolder folder;
  Write(folder / "model.safetensors", content);
  return Checkpoint::Open(folder.path()).status();
}

std::string OpenError(const std::string& header, const std::string& data) { return std::string(OpenStatus(Safetensors(header, data)).message()); }

TEST(CheckpointTest, ReadsTensorsOfAFile) {
  const TempFolder folder;
  Write(folder / "model.safetensors",
        Safetensors(R"({"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},"b":{"dtype":"F32","shape":[],"data_offsets":[0,4]}})",
                    "abcd0123456789AB"));
  const std::unique_ptr<Checkpoint> checkpoint = Checkpoint::Open(folder.path()).value();
  ASSERT_NE(checkpoint->Find("a"), nullptr);
  EXPECT_EQ(Describe(*checkpoint->Find("a")), "bf16 [2, 3]");
  EXPECT_EQ(checkpoint->Find("c"), nullptr);
  std::string bytes(5, ' ');
  ASSERT_TRUE(checkpoint->Read(*checkpoint->Find("a"), 7, 5, bytes.data()).ok());
  EXPECT_EQ(bytes, "789AB");
}

TEST(CheckpointTest, WrongHeadersNameFileTensorExpectedAndFound) {
  EXPECT_THAT(std::string(OpenStatus("").message()), HasSubstr("has 0 bytes: no safetensors file"));
  EXPECT_THAT(std::string(OpenStatus(std::string(8, '\xff')).message()), HasSubstr("says that its header has 18446744073709551615 bytes"));
  EXPECT_THAT(OpenError("{", ""), HasSubstr("model.safetensors: is not JSON"));
  EXPECT_THAT(OpenError(R"({"a":{}})", ""), HasSubstr("tensor 'a' has no dtype, shape and data_offsets"));
  EXPECT_THAT(OpenError(R"({"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}})", "01234567"), HasSubstr("tensor 'a' is F64"));
  EXPECT_THAT(OpenError(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", "0123"),
              HasSubstr("tensor 'a' has 4 bytes; f32 [2] needs 8"));
  EXPECT_THAT(OpenError(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", "0123"),
              HasSubstr("tensor 'a' lies at bytes [4,8] of the data; the file has 4"));
  EXPECT_THAT(OpenError(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})", "0123"), HasSubstr("lies at bytes [4,0]"));
  EXPECT_THAT(OpenError(R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", "0123"), HasSubstr("has the shape [-1]"));
  EXPECT_THAT(OpenError(R"({"a":{"dtype":"F32","shape":[281474976710656,281474976710656],"data_offsets":[0,4]}})", "0123"),
              HasSubstr("too large"));
  EXPECT_THAT(OpenError(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
                        "01234567"),
              HasSubstr("tensors 'a' and 'b' overlap"));
  EXPECT_THAT(OpenError(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
                        "01234567"),
              HasSubstr("has the key 'a' twice"));
}

TEST(CheckpointTest, AFileThatShrinksMeanwhileIsAnErrorNotASignal) {
  const TempFolder folder;
  Write(folder / "model.safetensors", Safetensors(R"({"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}})", "0123456789abcdef"));
  const std::unique_ptr<Checkpoint> checkpoint = Checkpoint::Open(folder.path()).value();
  ASSERT_EQ(truncate((folder / "model.safetensors").c_str(), 70), 0);
  char out[16];
  const absl::Status status = checkpoint->Read(*checkpoint->Find("a"), 0, 16, out);
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(status.message()), ContainsRegex("model.safetensors: ends at byte 70; .*did the file change.*, in tensor 'a'"));
}

TEST(CheckpointTest, AnIndexNamesItsShardsAndNothingOutsideTheFolder) {
  const TempFolder folder;
  Write(folder / "one.safetensors", Safetensors(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", "0123"));
  Write(folder / "two.safetensors", Safetensors(R"({"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", "0123"));
  const std::string index = folder / "model.safetensors.index.json";
  Write(index, R"({"weight_map":{"a":"one.safetensors"}})");
  EXPECT_EQ(Checkpoint::Open(folder.path()).value()->tensors().size(), 1u);
  Write(index, R"({"weight_map":{"a":"../one.safetensors"}})");
  EXPECT_THAT(std::string(Checkpoint::Open(folder.path()).status().message()), HasSubstr("only files of the folder itself are read"));
  Write(index, R"({"weight_map":{"a":"three.safetensors"}})");
  EXPECT_EQ(Checkpoint::Open(folder.path()).status().code(), absl::StatusCode::kNotFound);
  std::filesystem::remove(index);
  EXPECT_EQ(Checkpoint::Open(folder.path()).value()->tensors().size(), 2u);
  std::filesystem::copy(folder / "one.safetensors", folder / "copy.safetensors");
  EXPECT_THAT(std::string(Checkpoint::Open(folder.path()).status().message()), HasSubstr("tensor 'a' is also in"));
  EXPECT_THAT(std::string(Checkpoint::Open("/nowhere").status().message()), HasSubstr("/nowhere"));
}

// Copies a reference checkpoint into `folder`.
void CopyCheckpoint(const std::string& name, const TempFolder& folder) {
  std::filesystem::copy(std::string(MEMSERVE_GOLDEN_DIR) + "/" + name + "/checkpoint", folder.path(),
                        std::filesystem::copy_options::recursive | std::filesystem::copy_options::overwrite_existing);
}

std::string StartError(const TempFolder& folder) { return std::string(Engine::Create({.checkpoint = folder.path()}).status().message()); }

TEST(CheckpointTest, AConfigThatContradictsTheTensorsIsRefusedBeforeAnythingIsAllocated) {
  const auto error = [](const std::string& from, const std::string& to) {
    const TempFolder folder;
    CopyCheckpoint("A", folder);
    std::string config = ReadAll(folder / "config.json");
    const size_t at = config.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    Write(folder / "config.json", config.replace(at, from.size(), to));
    return StartError(folder);
  };
  EXPECT_THAT(error("\"vocab_size\": 258", "\"vocab_size\": 259"),
              HasSubstr("tensor 'tok_embeddings.weight' is f32 [258, 64]; config.json asks for [259, 64]"));
  EXPECT_THAT(error("\"n_layers\": 6", "\"n_layers\": 7"), HasSubstr("tensor 'layers.6.attention_norm.weight' is missing; config.json asks for [64]"));
  EXPECT_THAT(error("\"mem_n_keys\": 32", "\"mem_n_keys\": 33"), HasSubstr("'layers.1.feed_forward.values.weight' is bf16 [1024, 64]; config.json asks for [1089, 64]"));
  EXPECT_THAT(error("\"mem_share_values\": true", "\"mem_share_values\": true, \"mem_share_values\": false"), HasSubstr("twice"));
}

TEST(CheckpointTest, ASharedTableWhoseCopiesDifferIsRefused) {
  const TempFolder folder;
  CopyCheckpoint("A", folder);
  const std::unique_ptr<Checkpoint> checkpoint = Checkpoint::Open(folder.path()).value();
  const TensorInfo* copy = checkpoint->Find("layers.4.feed_forward.values.weight");
  ASSERT_NE(copy, nullptr);
  std::fstream file(folder / "model.safetensors", std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(copy->offset + copy->bytes - 1);
  file.put('\x7e');
  file.close();
  EXPECT_THAT(StartError(folder), HasSubstr("differ, but config.json says mem_share_values"));
}

// Bytes of config, header and tokenizer changed at random: an engine or an error, never a crash.
TEST(CheckpointTest, MutatedCheckpointsNeverCrash) {
  std::mt19937 random(11);
  int refused = 0;
  for (int round = 0; round < 150; ++round) {
    const TempFolder folder;
    CopyCheckpoint(round % 2 == 0 ? "F" : "B", folder);
    const char* files[] = {"config.json", "model.safetensors", "tokenizer.model"};
    const std::string path = folder / files[round % 2 == 0 ? random() % 3 : random() % 2];
    std::string content = ReadAll(path);
    const size_t reach = path.ends_with("model.safetensors") ? 4000 : content.size();
    for (uint32_t i = 0; i <= random() % 4; ++i) {
      const size_t at = random() % reach;
      switch (random() % 4) {
        case 0:
          content[at] = static_cast<char>(random());
          break;
        case 1:
          content.erase(at, 1 + random() % 8);
          break;
        case 2:
          content.insert(at, std::string(1 + random() % 4, static_cast<char>('0' + random() % 10)));
          break;
        default:
          content.resize(content.size() - random() % (content.size() / 2));
      }
      if (content.size() < reach) break;
    }
    Write(path, content);
    EngineOptions options;
    options.checkpoint = folder.path();
    options.memory_limit_bytes = 1 << 28;
    options.threads = 1;
    const absl::StatusOr<std::unique_ptr<Engine>> engine = Engine::Create(options);
    if (engine.ok()) continue;
    ++refused;
    EXPECT_EQ(engine.status().message().find('\n'), std::string::npos) << engine.status();
    EXPECT_FALSE(engine.status().message().empty());
  }
  EXPECT_GT(refused, 75);
}

}  // namespace
}  // namespace memserve::engine
