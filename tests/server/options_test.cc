#include "server/options.h"

#include <string>
#include <vector>

#include "absl/flags/reflection.h"
#include "absl/strings/match.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace memserve::server {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

absl::StatusOr<Options> Read(std::vector<std::string> arguments) {
  for (const auto& [name, flag] : absl::GetAllFlags()) {  // of an earlier reading
    std::string error;
    if (!absl::EndsWith(flag->Filename(), "server/options.cc")) continue;
    EXPECT_TRUE(flag->ParseFrom(flag->DefaultValue(), &error)) << error;
  }
  arguments.insert(arguments.begin(), "memserve");
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  return ParseCommandLine(static_cast<int>(argv.size()), argv.data());
}

TEST(OptionsTest, EveryFlagReachesItsOption) {
  const auto options = Read({"--checkpoint=DIR",
                             "--model_name=m",
                             "--backend=reference",
                             "--devices=0,1",
                             "--threads=3",
                             "--isa=AVX2",
                             "--weight_dtype=bf16",
                             "--activation_dtype=f32",
                             "--table_dtype=bf16",
                             "--kv_dtype=f32",
                             "--kv_cache_bytes=5000000000",
                             "--kv_page_size=32",
                             "--max_context_tokens=100",
                             "--max_batch_tokens=64",
                             "--max_sequences=5",
                             "--max_waiting=6",
                             "--max_prompt_bytes=7",
                             "--count_rows=false",
                             "--max_trace_entries=77",
                             "--tokenizer_threads=2",
                             "--loader_threads=8",
                             "--memory_limit_bytes=9000000000",
                             "--dry_run",
                             "--grpc_address=[::1]:1234",
                             "--port_file=P",
                             "--drain_seconds=11",
                             "--stall_seconds=15",
                             "--convert_cache=/c",
                             "--max_message_bytes=120000",
                             "--max_unread_bytes=130000",
                             "--log_level=debug",
                             "--log_load_seconds=3",
                             "--log_json"});
  ASSERT_TRUE(options.ok()) << options.status();
  const engine::EngineOptions& engine = options->engine;
  EXPECT_EQ(engine.checkpoint, "DIR");
  EXPECT_EQ(engine.model_name, "m");
  EXPECT_EQ(engine.backend, "reference");
  EXPECT_THAT(engine.devices, ElementsAre(0, 1));
  EXPECT_EQ(engine.threads, 3);
  EXPECT_EQ(engine.isa, "AVX2");
  EXPECT_EQ(engine.weight_dtype, "bf16");
  EXPECT_EQ(engine.activation_dtype, "f32");
  EXPECT_EQ(engine.table_dtype, "bf16");
  EXPECT_EQ(engine.kv_dtype, "f32");
  EXPECT_EQ(engine.kv_cache_bytes, 5'000'000'000);
  EXPECT_EQ(engine.kv_page_size, 32);
  EXPECT_EQ(engine.max_context_tokens, 100);
  EXPECT_EQ(engine.max_batch_tokens, 64);
  EXPECT_EQ(engine.max_sequences, 5);
  EXPECT_EQ(engine.max_waiting, 6);
  EXPECT_EQ(engine.max_prompt_bytes, 7);
  EXPECT_FALSE(options->engine.count_rows);
  EXPECT_EQ(options->engine.max_trace_entries, 77);
  EXPECT_EQ(engine.tokenizer_threads, 2);
  EXPECT_EQ(engine.loader_threads, 8);
  EXPECT_EQ(engine.memory_limit_bytes, 9'000'000'000);
  EXPECT_TRUE(engine.dry_run);
  const ServerOptions& server = options->server;
  EXPECT_EQ(server.grpc_address, "[::1]:1234");
  EXPECT_EQ(server.port_file, "P");
  EXPECT_EQ(server.drain_seconds, 11);
  EXPECT_EQ(server.stall_seconds, 15);
  EXPECT_EQ(server.convert_cache, "/c");
  EXPECT_EQ(server.max_message_bytes, 120000);
  EXPECT_EQ(server.max_unread_bytes, 130000);
  EXPECT_EQ(server.log_level, "debug");
  EXPECT_EQ(server.log_load_seconds, 3);
  EXPECT_TRUE(server.log_json);
}

TEST(OptionsTest, WithoutFlagsTheDefaultsAreTheStructs) {
  const auto options = Read({"--checkpoint=DIR"});
  ASSERT_TRUE(options.ok()) << options.status();
  EXPECT_EQ(options->engine.max_batch_tokens, engine::EngineOptions().max_batch_tokens);
  EXPECT_EQ(options->engine.devices, engine::EngineOptions().devices);
  EXPECT_EQ(options->server.grpc_address, "127.0.0.1:50051");
  EXPECT_FALSE(options->server.allow_public);
}

TEST(OptionsTest, AnAddressThatOthersReachNeedsAllowPublic) {
  for (const char* address : {"127.0.0.1:0", "127.1.2.3:80", "localhost:50051", "[::1]:50051", "unix:/tmp/socket"}) {
    EXPECT_TRUE(Read({"--checkpoint=D", std::string("--grpc_address=") + address}).ok()) << address;
  }
  for (const char* address :
       {"0.0.0.0:50051", "[::]:50051", "10.0.0.1:50051", "127.0.0.1.evil.org:1", "example.org:50051", "127.0.0.999:1"}) {
    const auto options = Read({"--checkpoint=D", std::string("--grpc_address=") + address});
    ASSERT_FALSE(options.ok()) << address;
    EXPECT_THAT(options.status().message(), AllOf(HasSubstr(address), HasSubstr("--allow_public")));
    EXPECT_TRUE(Read({"--checkpoint=D", "--allow_public", std::string("--grpc_address=") + address}).ok()) << address;
  }
}

TEST(OptionsTest, AFlagOutOfRangeIsNamedWithValueAndLimit) {
  const std::vector<std::vector<std::string>> cases = {
      {"--grpc_address=127.0.0.1", "--grpc_address", "127.0.0.1", "65535"},
      {"--grpc_address=127.0.0.1:70000", "--grpc_address", "70000", "65535"},
      {"--grpc_address=:1", "--grpc_address", ":1", "host:port"},
      {"--drain_seconds=-1", "--drain_seconds", "-1", "0"},
      {"--stall_seconds=0", "--stall_seconds", "0", "1"},
      {"--max_message_bytes=0", "--max_message_bytes", "0", "1024"},
      {"--max_unread_bytes=0", "--max_unread_bytes", "0", "1024"},
      {"--log_load_seconds=-1", "--log_load_seconds", "-1", "0"},
      {"--log_level=loud", "--log_level", "loud", "debug"},
      {"--devices=0,x", "--devices", "0,x", "0,1"},
      {"--devices=-1", "--devices", "-1", "0,1"},
      {"stray", "stray", "--name=value"},
  };
  for (const auto& test_case : cases) {
    const auto options = Read({"--checkpoint=D", test_case[0]});
    ASSERT_FALSE(options.ok()) << test_case[0];
    for (size_t i = 1; i < test_case.size(); ++i) EXPECT_THAT(options.status().message(), HasSubstr(test_case[i])) << test_case[0];
  }
  EXPECT_THAT(Read({}).status().message(), HasSubstr("--checkpoint is missing"));
}

}  // namespace
}  // namespace memserve::server
