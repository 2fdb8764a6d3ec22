// memserve-inspect as a user runs it.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdio>
#include <filesystem>
#include <string>

#include "nlohmann/json.hpp"
#include "tests/support/files.h"

namespace memserve::engine {
namespace {

using ::testing::HasSubstr;
using nlohmann::json;
using testing::TempFolder;

struct Answer {
  int status;
  std::string text;  // standard output and error
};

Answer RunInspect(const std::string& arguments) {
  FILE* pipe = popen((std::string(MEMSERVE_INSPECT) + " " + arguments + " 2>&1").c_str(), "r");
  Answer answer;
  for (char buffer[4096]; size_t read = fread(buffer, 1, sizeof(buffer), pipe);) answer.text.append(buffer, read);
  answer.status = WEXITSTATUS(pclose(pipe));
  return answer;
}

std::string Golden(const std::string& name) { return std::string(MEMSERVE_GOLDEN_DIR) + "/" + name + "/checkpoint"; }

json InspectJson(const std::string& arguments) { return json::parse(RunInspect(arguments + " --json").text); }

TEST(InspectTest, ListsWhatIsInACheckpoint) {
  const json a = InspectJson(Golden("A"));
  EXPECT_EQ(a["model"]["n_layers"], 6);
  EXPECT_EQ(a["tokenizer"]["kind"], "bytes");
  ASSERT_EQ(a["memory_layers"].size(), 2);
  EXPECT_EQ(a["memory_layers"][1]["layer"], 4);
  EXPECT_EQ(a["memory_layers"][1]["table_of_layer"], 1) << "shared";
  int64_t bytes = 0;
  for (const json& group : a["tensors"]) {
    EXPECT_NE(group["kind"], "other");
    bytes += group["bytes"].get<int64_t>();
  }
  int64_t stored = 0;
  for (const auto& [name, tensor] : testing::ReadTensors(Golden("A") + "/model.safetensors")) stored += tensor.bytes.size();
  EXPECT_EQ(bytes, stored);
  EXPECT_TRUE(InspectJson(Golden("E"))["memory_layers"].empty()) << "memory is switched off there";
  EXPECT_EQ(InspectJson(Golden("B"))["memory_layers"][1]["table_of_layer"], 2) << "own tables";
  EXPECT_EQ(InspectJson(Golden("D"))["memory_layers"][0]["form"], "PEER");
  EXPECT_THAT(RunInspect(Golden("A")).text, HasSubstr("Memory+  of layer 1"));
}

TEST(InspectTest, SaysWhatAMachineWouldHold) {
  const json whole = InspectJson(Golden("A"))["held"];
  EXPECT_TRUE(whole["plan"]["fits"]);
  EXPECT_EQ(whole["bf16"]["table_bytes"], whole["plan"]["table_bytes"]) << "as it is stored";
  EXPECT_EQ(whole["f32"]["table_bytes"].get<int64_t>(), 2 * whole["bf16"]["table_bytes"].get<int64_t>());
  EXPECT_LT(whole["int4"]["table_bytes"], whole["int8"]["table_bytes"]);
  EXPECT_LT(whole["int8"]["table_bytes"], whole["bf16"]["table_bytes"]);
  const json split = InspectJson(Golden("A") + " --devices=2 --table_dtype=f32")["held"];
  EXPECT_EQ(split["devices"], 2);
  EXPECT_EQ(split["plan"]["table_bytes"], whole["f32"]["table_bytes"]) << "the table is split, not copied";
  EXPECT_LT(split["plan"]["largest_device_bytes"], whole["f32"]["total_bytes"]);
  const json small = InspectJson(Golden("A") + " --memory_limit_bytes=1000000")["held"];
  EXPECT_FALSE(small["plan"]["fits"]);
  EXPECT_THAT(small["plan"]["does_not_fit"].get<std::string>(), HasSubstr("976.6 KiB are available"));
}

TEST(InspectTest, ChecksumsAreHeldAgainstTheListOfTheFolder) {
  const TempFolder folder;
  std::filesystem::copy(Golden("B"), folder.path());
  const std::string config = folder / "config.json";
  ASSERT_EQ(std::system(("cd " + folder.path() + " && sha256sum config.json model.safetensors > SHA256SUMS").c_str()), 0);
  const Answer good = RunInspect(folder.path() + " --checksums");
  EXPECT_EQ(good.status, 0);
  EXPECT_THAT(good.text, HasSubstr("as listed"));
  testing::WriteFile(config, testing::ReadWholeFile(config) + " ");
  const Answer changed = RunInspect(folder.path() + " --checksums");
  EXPECT_EQ(changed.status, 2);
  EXPECT_THAT(changed.text, HasSubstr("NOT AS LISTED"));
  EXPECT_EQ(RunInspect(folder.path()).status, 0) << "not asked for";
}

TEST(InspectTest, WhatIsWrongIsOneLine) {
  for (const auto& [arguments, message] : std::vector<std::pair<std::string, std::string>>{
           {"", "memserve-inspect: give one CHECKPOINT folder; see --help\n"},
           {"/nowhere", "memserve-inspect: /nowhere/config.json: No such file or directory\n"},
           {Golden("A") + " --devices=0", "memserve-inspect: --devices must be from 1 to 64\n"},
           {Golden("A") + " --table_dtype=x", "memserve-inspect: table_dtype: 'x' is not one of auto, f32, bf16, int8, int4\n"}}) {
    const Answer answer = RunInspect(arguments);
    EXPECT_EQ(answer.status, 1);
    EXPECT_EQ(answer.text, message);
  }
  EXPECT_EQ(RunInspect("--help").status, 0);
}

}  // namespace
}  // namespace memserve::engine
