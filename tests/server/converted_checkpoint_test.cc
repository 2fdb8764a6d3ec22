// Checkpoints in other formats on their way to the engine. The converter here is a script that says what it was given; the real one is
// tested with the Python package.
#include "server/converted_checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstdlib>
#include <filesystem>
#include <string>

#include "tests/support/files.h"

namespace memserve::server {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;
using testing::ReadWholeFile;
using testing::TempFolder;
using testing::WriteFile;

class ConvertedCheckpointTest : public ::testing::Test {
 protected:
  void SetUp() override {
    path_ = getenv("PATH");
    setenv("PATH", (bin_.path() + ":" + path_).c_str(), 1);
  }
  void TearDown() override { setenv("PATH", path_.c_str(), 1); }

  void InstallConverter(const std::string& last_line) {
    const std::string script = bin_ / "memserve-convert";
    WriteFile(script, "#!/bin/sh\necho run >> " + (bin_ / "runs") + "\nmkdir -p \"$2\"\necho \"$1\" > \"$2/config.json\"\n" + last_line + "\n");
    chmod(script.c_str(), 0755);
  }
  int Runs() {
    const std::string runs = ReadWholeFile(bin_ / "runs");
    return static_cast<int>(std::count(runs.begin(), runs.end(), '\n'));
  }
  std::string MessageOf(const std::string& checkpoint, const std::string& cache) {
    return std::string(ConvertedCheckpoint(checkpoint, cache).status().message());
  }

  TempFolder bin_, source_, cache_;
  std::string path_;
};

TEST_F(ConvertedCheckpointTest, WhatTheEngineReadsItselfStaysAsItIs) {
  InstallConverter("exit 1");
  EXPECT_EQ(ConvertedCheckpoint("/nowhere", cache_.path()).value(), "/nowhere");
  WriteFile(source_ / "config.json", "{}");
  WriteFile(source_ / "model.safetensors", "");
  WriteFile(source_ / "params.json", "{}");
  EXPECT_EQ(ConvertedCheckpoint(source_.path(), cache_.path()).value(), source_.path());
  EXPECT_EQ(Runs(), 0);
}

TEST_F(ConvertedCheckpointTest, OtherFormatsAreConvertedOnceAndAgainWhenTheyChange) {
  InstallConverter("exit 0");
  WriteFile(source_ / "params.json", "{}");
  const std::string target = ConvertedCheckpoint(source_.path(), cache_.path()).value();
  EXPECT_THAT(target, StartsWith(cache_.path() + "/"));
  EXPECT_EQ(ReadWholeFile(target + "/config.json"), std::filesystem::canonical(source_.path()).string() + "\n");
  EXPECT_EQ(ConvertedCheckpoint(source_.path() + "/", cache_.path()).value(), target);
  EXPECT_EQ(Runs(), 1) << "the conversion is kept";
  WriteFile(source_ / "params.json", "{ }");
  EXPECT_NE(ConvertedCheckpoint(source_.path(), cache_.path()).value(), target);
  EXPECT_EQ(Runs(), 2) << "another source by now";
}

TEST_F(ConvertedCheckpointTest, KnowsTheKindsByTheirFiles) {
  for (const std::string name : {"params.json", ".metadata", "model.gguf", "rest.pt", "pytorch_model.bin", "consolidated.00.pth"}) {
    const TempFolder folder;
    WriteFile(folder / name, "");
    EXPECT_THAT(MessageOf(folder.path(), ""), HasSubstr("must be converted: say --convert_cache=DIR, or run memserve-convert")) << name;
  }
  WriteFile(source_ / "model.gguf", "");
  EXPECT_THAT(MessageOf(source_ / "model.gguf", ""), HasSubstr("is a GGUF file"));
}

TEST_F(ConvertedCheckpointTest, AFailedConversionIsNotKept) {
  InstallConverter("exit 3");
  WriteFile(source_ / "params.json", "{}");
  EXPECT_THAT(MessageOf(source_.path(), cache_.path()), HasSubstr("memserve-convert ended with status 3"));
  InstallConverter("kill -9 $$");
  EXPECT_THAT(MessageOf(source_.path(), cache_.path()), HasSubstr("memserve-convert ended with status 137"));
  InstallConverter("exit 0");
  EXPECT_TRUE(ConvertedCheckpoint(source_.path(), cache_.path()).ok());
  EXPECT_EQ(Runs(), 3);
}

TEST_F(ConvertedCheckpointTest, SaysInOneLineThatTheConverterIsNotInstalled) {
  setenv("PATH", bin_.path().c_str(), 1);
  WriteFile(source_ / "params.json", "{}");
  const std::string message = MessageOf(source_.path(), cache_.path());
  EXPECT_THAT(message, HasSubstr("the converter memserve-convert is not installed: pip install clients/python"));
  EXPECT_EQ(message.find('\n'), std::string::npos);
}

}  // namespace
}  // namespace memserve::server
