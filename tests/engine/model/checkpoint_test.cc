// Checkpoint files that are wrong: one clear line each, and never a crash.

#include "engine/model/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <random>
#include <sstream>

#include "engine/engine.h"
#include "tests/support/files.h"
#include "tests/support/golden.h"

namespace memserve::engine {
namespace {

using ::testing::ContainsRegex;
using ::testing::HasSubstr;

using testing::ReadWholeFile;
using testing::TempFolder;
using testing::WriteFile;

std::string Safetensors(const std::string& header, const std::string& data) {
  const uint64_t length = header.size();
  return std::string(reinterpret_cast<const char*>(&length), 8) + header + data;
}

absl::Status OpenStatus(const std::string& content) {
  const TempFolder folder;
  WriteFile(folder / "model.safetensors", content);
  return Checkpoint::Open(folder.path()).status();
}

std::string OpenError(const std::string& header, const std::string& data) { return std::string(OpenStatus(Safetensors(header, data)).message()); }

TEST(CheckpointTest, ReadsTensorsOfAFile) {
  const TempFolder folder;
  WriteFile(
      folder / "model.safetensors",
      Safetensors(
          R"({"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},"b":{"dtype":"F32","shape":[],"data_offsets":[0,4]}})",
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
  EXPECT_THAT(OpenError(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}})",
                        "0123456789ab"),
              HasSubstr("bytes 4 to 8 of the data, before 'b', belong to no tensor"));
  EXPECT_THAT(OpenError(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", "01234567"),
              HasSubstr("has 8 bytes of data; its tensors take 4, up to 'a'"));
  EXPECT_THAT(OpenError(R"({"a\nb":{"dtype":"F\n","shape":[1],"data_offsets":[0,4]}})", "0123"), HasSubstr("tensor 'a\\nb' is F\\n;"));
  EXPECT_THAT(OpenError(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
                        "01234567"),
              HasSubstr("has the key 'a' twice"));
}

TEST(CheckpointTest, AFileThatShrinksMeanwhileIsAnErrorNotASignal) {
  const TempFolder folder;
  WriteFile(folder / "model.safetensors",
            Safetensors(R"({"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}})", "0123456789abcdef"));
  const std::unique_ptr<Checkpoint> checkpoint = Checkpoint::Open(folder.path()).value();
  ASSERT_EQ(truncate((folder / "model.safetensors").c_str(), 70), 0);
  char out[16];
  const absl::Status status = checkpoint->Read(*checkpoint->Find("a"), 0, 16, out);
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(status.message()), ContainsRegex("model.safetensors: ends at byte 70; .*did the file change.*, in tensor 'a'"));
}

TEST(CheckpointTest, AnIndexNamesItsShardsAndNothingOutsideTheFolder) {
  const TempFolder folder;
  WriteFile(folder / "one.safetensors", Safetensors(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", "0123"));
  WriteFile(folder / "two.safetensors", Safetensors(R"({"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", "0123"));
  const std::string index = folder / "model.safetensors.index.json";
  WriteFile(index, R"({"weight_map":{"a":"one.safetensors"}})");
  EXPECT_EQ(Checkpoint::Open(folder.path()).value()->tensors().size(), 1u);
  WriteFile(index, R"({"weight_map":{"a":"../one.safetensors"}})");
  EXPECT_THAT(std::string(Checkpoint::Open(folder.path()).status().message()), HasSubstr("only files of the folder itself are read"));
  WriteFile(index, R"({"weight_map":{"a":"three.safetensors"}})");
  EXPECT_EQ(Checkpoint::Open(folder.path()).status().code(), absl::StatusCode::kNotFound);
  std::filesystem::remove(index);
  EXPECT_EQ(Checkpoint::Open(folder.path()).value()->tensors().size(), 2u);
  std::filesystem::copy(folder / "one.safetensors", folder / "copy.safetensors");
  EXPECT_THAT(std::string(Checkpoint::Open(folder.path()).status().message()), HasSubstr("tensor 'a' is also in"));
  EXPECT_THAT(std::string(Checkpoint::Open("/nowhere").status().message()), HasSubstr("/nowhere"));
}

TEST(CheckpointTest, AnIndexThatNamesAnotherFileForATensorIsRefused) {
  const TempFolder folder;
  WriteFile(folder / "one.safetensors", Safetensors(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", "0123"));
  WriteFile(folder / "two.safetensors", Safetensors(R"({"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", "0123"));
  const auto error = [&](const std::string& map) {
    WriteFile(folder / "model.safetensors.index.json", "{\"weight_map\":" + map + "}");
    return std::string(Checkpoint::Open(folder.path()).status().message());
  };
  EXPECT_EQ(error(R"({"a":"one.safetensors","b":"two.safetensors"})"), "");
  EXPECT_THAT(error(R"({"a":"two.safetensors","b":"one.safetensors"})"), HasSubstr("says that tensor 'a' is in two.safetensors; it is in "));
  EXPECT_THAT(error(R"({"a":"one.safetensors","c":"one.safetensors"})"), HasSubstr("says that tensor 'c' is in one.safetensors; it is in no file"));
  EXPECT_THAT(error(R"({"a":"/etc/passwd"})"), HasSubstr("only files of the folder itself are read"));
  EXPECT_THAT(error(R"({"a":"one.safetensors\u0000x"})"), HasSubstr("only files of the folder itself are read"));
  EXPECT_THAT(error("{}"), HasSubstr("weight_map is empty"));
  EXPECT_THAT(error("7"), HasSubstr("has no weight_map"));
}

TEST(CheckpointTest, LinksStayInTheFolderOrLeadToABlobOfTheHubsCache) {
  const TempFolder outside, cache;
  const std::string content = Safetensors(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", "0123");
  WriteFile(outside / "model.safetensors", content);
  std::filesystem::create_directories(cache / "blobs");
  std::filesystem::create_directories(cache / "snapshots/main");
  const std::string snapshot = cache / "snapshots/main", link = snapshot + "/model.safetensors", hash(64, 'a');
  WriteFile(cache / ("blobs/" + hash), content);
  const auto status_of = [&](const std::string& target) {
    std::filesystem::remove(link);
    std::filesystem::create_symlink(target, link);
    return Checkpoint::Open(snapshot).status();
  };
  EXPECT_TRUE(status_of("../../blobs/" + hash).ok());
  EXPECT_THAT(std::string(status_of(outside / "model.safetensors").message()), ContainsRegex("model.safetensors: is a link to .* out of the folder"));
  EXPECT_THAT(std::string(status_of("../../blobs/../blobs/" + hash).message()), HasSubstr("out of the folder"));
  EXPECT_THAT(std::string(status_of("../../blobs/none" + hash).message()), HasSubstr("leads nowhere"));
  WriteFile(snapshot + "/real", content);
  EXPECT_TRUE(status_of("real").ok());
  std::filesystem::remove(cache / ("blobs/" + hash));
  std::filesystem::create_symlink(outside / "model.safetensors", cache / ("blobs/" + hash));
  EXPECT_THAT(std::string(status_of("../../blobs/" + hash).message()), HasSubstr("out of the folder"));
}

TEST(CheckpointTest, AFileThatChangedSinceItWasOpenedIsReported) {
  const TempFolder folder;
  const std::string path = folder / "model.safetensors", content = Safetensors(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", "0123");
  WriteFile(path, content);
  const auto after = [&](const std::function<void()>& change) {
    const std::unique_ptr<Checkpoint> checkpoint = Checkpoint::Open(folder.path()).value();
    change();
    return std::string(checkpoint->CheckUnchanged().message());
  };
  EXPECT_EQ(after([] {}), "");
  EXPECT_THAT(after([&] { WriteFile(path + ".new", content), std::filesystem::rename(path + ".new", path); }),
              HasSubstr("changed while it was loaded"));
  EXPECT_THAT(after([&] { std::filesystem::last_write_time(path, std::filesystem::file_time_type::clock::now() + std::chrono::hours(1)); }),
              HasSubstr("changed while it was loaded"));
  EXPECT_THAT(after([&] { WriteFile(path, content + "x"); }), HasSubstr("now it has " + std::to_string(content.size() + 1)));
  WriteFile(path, content);
  EXPECT_THAT(after([&] { std::filesystem::remove(path); }), HasSubstr("now it is gone"));
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
    std::string config = ReadWholeFile(folder / "config.json");
    const size_t at = config.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    WriteFile(folder / "config.json", config.replace(at, from.size(), to));
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

TEST(CheckpointTest, TensorsThatContradictTheConfigAreRefusedAndOthersLeftOut) {
  const auto error = [](const std::string& name, const std::string& added) {
    const TempFolder folder;
    CopyCheckpoint(name, folder);
    auto tensors = testing::ReadTensors(folder / "model.safetensors");
    tensors[added] = testing::MakeTensor<float>("F32", {1}, {0});
    testing::WriteTensors(folder / "model.safetensors", tensors);
    return StartError(folder);
  };
  EXPECT_EQ(error("A", "something.else"), "");
  EXPECT_THAT(error("A", "layers.0.attention.wq.bias"),
              HasSubstr("has the tensor 'layers.0.attention.wq.bias', f32 [1]; by config.json the model has none there (attention_bias)"));
  EXPECT_THAT(error("A", "layers.6.ffn_norm.weight"), HasSubstr("(n_layers)"));
  EXPECT_THAT(error("A", "layers.0.feed_forward.keys"), HasSubstr("(productkey_args.layers)"));
  EXPECT_THAT(error("A", "layers.1.feed_forward.w1.weight"), HasSubstr("(productkey_args.layers)"));
  EXPECT_THAT(error("A", "layers.1.feed_forward.gating.bias"), HasSubstr("(productkey_args.mem_gated)"));
}

TEST(CheckpointTest, CountsWeightsThatAreNanOrInfinite) {
  for (const char* dtype : {"F32", "BF16", "F16"}) {
    const TempFolder folder;
    CopyCheckpoint("E", folder);
    auto tensors = testing::ReadTensors(folder / "model.safetensors");
    testing::StoredTensor& tensor = tensors.at("layers.1.attention.wo.weight");
    const bool wide = dtype == std::string("F32");
    int64_t values = 1;
    for (int64_t extent : tensor.shape) values *= extent;
    tensor.dtype = dtype;
    tensor.bytes.assign(values * (wide ? 4 : 2), '\0');
    const auto put = [&](int64_t i, uint32_t bits) { std::memcpy(&tensor.bytes[i * (wide ? 4 : 2)], &bits, wide ? 4 : 2); };
    const uint32_t infinity = wide ? 0x7f800000 : dtype == std::string("BF16") ? 0x7f80 : 0x7c00;
    put(0, infinity);
    put(77, infinity | (wide ? 0x80000000 : 0x8000));
    put(values / 2, infinity + 1);  // NaN
    put(values - 1, infinity + 1);
    put(1, infinity - 1);  // the largest finite value
    testing::WriteTensors(folder / "model.safetensors", tensors);
    const auto model = testing::LoadModel(testing::ParityOptions(folder.path()));
    EXPECT_THAT(model->executor->first_rank().loaded().not_finite, ::testing::ElementsAre(::testing::Pair("layers.1.attention.wo.weight", 4))) << dtype;
  }
  const auto sound = testing::LoadModel(testing::ParityOptions(std::string(MEMSERVE_GOLDEN_DIR) + "/E/checkpoint"));
  EXPECT_THAT(sound->executor->first_rank().loaded().not_finite, ::testing::IsEmpty());
}

}  // namespace
}  // namespace memserve::engine
