// What a client can get wrong, through gRPC into a real engine: each is answered with a code and a line that names field, value and
// limit, and nothing else is disturbed.
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/engine.h"
#include "engine/structured/grammar.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/server/harness.h"
#include "tests/support/golden.h"

namespace memserve::server {
namespace {

using ::testing::HasSubstr;

class BadInputTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    engine::EngineOptions options = testing::ParityOptions(std::string(MEMSERVE_GOLDEN_DIR) + "/A/checkpoint");
    options.grammar_timeout_ms = 1000;
    options.grammar_worker = std::string(MEMSERVE).substr(0, std::string(MEMSERVE).rfind('/')) + "/../engine/memserve-grammar";
    auto engine = engine::Engine::Create(options);
    ASSERT_TRUE(engine.ok()) << engine.status();
    auto server = Server::Listen(OnAnyPort());
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = server->release();
    ASSERT_TRUE(server_->Serve(*std::move(engine)).ok());
  }
  static void TearDownTestSuite() {
    delete server_;
    server_ = nullptr;
  }

  void SetUp() override {
    stub_ = v1::Inference::NewStub(Connect(server_->port()));
    before_ = GenerateGood();
  }

  // Whatever a test did: the same answer as before, and no page is held.
  void TearDown() override {
    const Heard after = GenerateGood();
    EXPECT_EQ(after.token_ids(), before_.token_ids());
    v1::GetLoadResponse load;
    for (int i = 0; i < 1000; ++i) {
      grpc::ClientContext context;
      ASSERT_TRUE(stub_->GetLoad(&context, {}, &load).ok());
      if (load.kv_pages_used() == 0) break;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    EXPECT_EQ(load.kv_pages_used(), 0);
    EXPECT_EQ(load.running() + load.waiting(), 0);
  }

  static v1::GenerateRequest Good() {
    v1::GenerateRequest request;
    request.set_text("The keeper");
    request.mutable_stop()->set_max_tokens(4);
    return request;
  }
  Heard GenerateGood() {
    Heard heard = Generate(*stub_, Good());
    EXPECT_TRUE(heard.status.ok()) << heard.status.error_message();
    return heard;
  }

  static Server* server_;
  std::unique_ptr<v1::Inference::Stub> stub_;
  Heard before_;
};

Server* BadInputTest::server_ = nullptr;

struct Case {
  std::string field;  // what the message begins with
  std::string value, limit;
  std::function<void(v1::GenerateRequest&)> change;
  grpc::StatusCode code = grpc::StatusCode::INVALID_ARGUMENT;
};

TEST_F(BadInputTest, EveryParameterOutOfRangeIsNamedWithValueAndLimit) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  std::vector<Case> cases = {
      {"prompt", "not set", "text, tokens or chat", [](auto& r) { r.clear_prompt(); }},
      {"prompt", "no tokens", "at least 1", [](auto& r) { r.mutable_tokens(); }},
      {"prompt", "5000 tokens", "255", [](auto& r) { r.set_text(std::string(4999, 'x')); }},
      {"prompt", "1048577 bytes", "1048576", [](auto& r) { r.set_text(std::string((1 << 20) + 1, 'x')); }},
      {"prompt", "-1 at index 0", "[0, 258)", [](auto& r) { r.mutable_tokens()->add_ids(-1); }},
      {"prompt", "258 at index 0", "[0, 258)", [](auto& r) { r.mutable_tokens()->add_ids(258); }},
      {"prompt", "2147483647", "[0, 258)", [](auto& r) { r.mutable_tokens()->add_ids(2147483647); }},
      {"request_id", "300 bytes", "256", [](auto& r) { r.set_request_id(std::string(300, 'i')); }},
      {"model", "another", "", [](auto& r) { r.set_model("another"); }, grpc::StatusCode::NOT_FOUND},
      {"stop.strings", "100000 strings", "16",
       [](auto& r) {
         for (int i = 0; i < 100'000; ++i) r.mutable_stop()->add_strings("stop");
       }},
      {"stop.strings", "0 bytes", "256", [](auto& r) { r.mutable_stop()->add_strings(""); }},
      {"stop.strings", "257 bytes", "256", [](auto& r) { r.mutable_stop()->add_strings(std::string(257, 's')); }},
      {"stop.token_ids", "-7", "[0, 258)", [](auto& r) { r.mutable_stop()->add_token_ids(-7); }},
      {"stop.token_ids", "100000 ids", "64", [](auto& r) { r.mutable_stop()->mutable_token_ids()->Resize(100'000, 1); }},
      {"max_tokens", "0", "at least 1", [](auto& r) { r.mutable_stop()->set_max_tokens(0); }},
      {"max_tokens", "-2147483648", "at least 1", [](auto& r) { r.mutable_stop()->set_max_tokens(INT32_MIN); }},
      {"min_tokens", "-1", "[0, 4]", [](auto& r) { r.mutable_stop()->set_min_tokens(-1); }},
      {"min_tokens", "5", "[0, 4]", [](auto& r) { r.mutable_stop()->set_min_tokens(5); }},
      {"top_k", "-1", "at least 0", [](auto& r) { r.mutable_sampling()->set_top_k(-1); }},
      {"penalty_window", "-1", "at least 0", [](auto& r) { r.mutable_sampling()->set_penalty_window(-1); }},
      {"logit_bias", "2000", "1024",
       [](auto& r) {
         for (int i = 0; i < 2000; ++i) (*r.mutable_sampling()->mutable_logit_bias())[i] = 1;
       }},
      {"logit_bias", "-3", "[0, 258)", [](auto& r) { (*r.mutable_sampling()->mutable_logit_bias())[-3] = 1; }},
      {"logit_bias[3]", "nan", "[-1000, 1000]", [&](auto& r) { (*r.mutable_sampling()->mutable_logit_bias())[3] = nan; }},
      {"logit_bias[3]", "inf", "[-1000, 1000]", [&](auto& r) { (*r.mutable_sampling()->mutable_logit_bias())[3] = inf; }},
      {"banned_token_ids", "1025 ids", "1024", [](auto& r) { r.mutable_sampling()->mutable_banned_token_ids()->Resize(1025, 1); }},
      {"banned_token_ids", "258", "[0, 258)", [](auto& r) { r.mutable_sampling()->add_banned_token_ids(258); }},
      {"allowed_token_ids", "100000 ids", "258",
       [](auto& r) { r.mutable_sampling()->mutable_allowed_token_ids()->Resize(100'000, 1); }},
      {"allowed_token_ids", "-1", "[0, 258)", [](auto& r) { r.mutable_sampling()->add_allowed_token_ids(-1); }},
      {"allowed_token_ids", "all of them are banned", "",
       [](auto& r) {
         r.mutable_sampling()->add_allowed_token_ids(5);
         r.mutable_sampling()->add_banned_token_ids(5);
       }},
      {"top_logprobs", "-1", "[0, 20]", [](auto& r) { r.mutable_output()->set_top_logprobs(-1); }},
      {"top_logprobs", "21", "[0, 20]", [](auto& r) { r.mutable_output()->set_top_logprobs(21); }},
      {"memory.knn", "0", "[1, ", [](auto& r) { r.mutable_memory()->set_knn(0); }},
      {"memory.layers", "99", "", [](auto& r) { r.mutable_memory()->add_layers(99); }},
      {"memory.masked_rows", "-1", "", [](auto& r) { r.mutable_memory()->add_masked_rows(-1); }},
      {"memory.masked_rows", "100000", "1024", [](auto& r) { r.mutable_memory()->mutable_masked_rows()->Resize(100'000, 1); }},
      {"memory_trace.tokens", "-1", "", [](auto& r) { r.mutable_output()->mutable_memory_trace()->set_tokens(-1); }},
      {"scheduling.priority", "1001", "[-1000, 1000]", [](auto& r) { r.mutable_scheduling()->set_priority(1001); }},
      {"scheduling.cache_salt", "257 bytes", "256", [](auto& r) { r.mutable_scheduling()->set_cache_salt(std::string(257, 's')); }},
      {"structured", "not set", "json_schema", [](auto& r) { r.mutable_structured(); }},
      {"structured.json", "false", "true", [](auto& r) { r.mutable_structured()->set_json(false); }},
  };
  const auto numbers = [&](const std::string& field, const std::string& limit, std::vector<float> wrong, auto set) {
    for (const float value : wrong) {
      cases.push_back({field, absl::StrCat(value), limit, [set, value](auto& r) { set(*r.mutable_sampling(), value); }});
    }
  };
  numbers("temperature", "[0, 100]", {-0.5f, 101, nan, inf, -inf}, [](auto& s, float v) { s.set_temperature(v); });
  numbers("top_p", "(0, 1]", {0, -1, 1.5f, nan, inf}, [](auto& s, float v) { s.set_top_p(v); });
  numbers("min_p", "[0, 1]", {-0.5f, 1.5f, nan, inf}, [](auto& s, float v) { s.set_min_p(v); });
  numbers("typical_p", "(0, 1]", {0, 1.5f, nan, inf}, [](auto& s, float v) { s.set_typical_p(v); });
  numbers("repetition_penalty", "(0, 100]", {0, -1, 101, nan, inf}, [](auto& s, float v) { s.set_repetition_penalty(v); });
  numbers("presence_penalty", "[-100, 100]", {-101, 101, nan, inf}, [](auto& s, float v) { s.set_presence_penalty(v); });
  numbers("frequency_penalty", "[-100, 100]", {-101, 101, nan, -inf}, [](auto& s, float v) { s.set_frequency_penalty(v); });
  if (engine::StructuredOutputIsBuilt()) {
    cases.push_back({"structured.regex", "0 bytes", "65536", [](auto& r) { r.mutable_structured()->set_regex(""); }});
    cases.push_back(
        {"structured.regex", "65537 bytes", "65536", [](auto& r) { r.mutable_structured()->set_regex(std::string(65537, 'a')); }});
    cases.push_back({"structured.choice", "0 texts", "1024", [](auto& r) { r.mutable_structured()->mutable_choice(); }});
    cases.push_back({"structured.choice", "100000 texts", "1024", [](auto& r) {
                       for (int i = 0; i < 100'000; ++i) r.mutable_structured()->mutable_choice()->add_texts("a");
                     }});
    cases.push_back({"structured.json_schema", "", "", [](auto& r) { r.mutable_structured()->set_json_schema("{"); }});
  }
  for (const Case& one : cases) {
    SCOPED_TRACE(absl::StrCat(one.field, " ", one.value));
    v1::GenerateRequest request = Good();
    one.change(request);
    const Heard heard = Generate(*stub_, request);
    EXPECT_EQ(heard.status.error_code(), one.code);
    EXPECT_EQ(heard.status.error_message().substr(0, one.field.size()), one.field) << heard.status.error_message();
    EXPECT_THAT(heard.status.error_message(), HasSubstr(one.value));
    EXPECT_THAT(heard.status.error_message(), HasSubstr(one.limit));
    EXPECT_EQ(heard.status.error_message().find('\n'), std::string::npos);
    EXPECT_TRUE(heard.deltas.empty());
  }
}

// Beside a stream that runs, and is not disturbed.
TEST_F(BadInputTest, GrammarsThatExplodeFailAlone) {
  if (!engine::StructuredOutputIsBuilt()) GTEST_SKIP() << "built without structured output";
  std::vector<v1::GenerateRequest> bombs;
  std::vector<bool> may_compile;
  const auto add = [&](auto set) {
    bombs.push_back(Good());
    set(*bombs.back().mutable_structured());
    may_compile.push_back(false);
  };
  add([](auto& s) { s.set_regex("((((a{1,1000}){1,1000}){1,1000}){1,1000}b)"); });
  add([](auto& s) { s.set_regex("a{1,100000}"); });
  for (const size_t regex : {0, 1}) may_compile[regex] = true;  // with a vocabulary as small as this one
  add([](auto& s) {
    std::string properties;
    for (int i = 0; i < 300; ++i)
      absl::StrAppend(&properties, i == 0 ? "" : ",", "\"p", i, "\":{\"type\":\"string\",\"maxLength\":1000000}");
    s.set_json_schema("{\"type\":\"object\",\"properties\":{" + properties + "}}");
  });
  add([](auto& s) { s.set_regex(std::string(30'000, '(') + "a" + std::string(30'000, ')')); });
  add([](auto& s) {
    std::string list = "[";
    for (int i = 0; i < 20'000; ++i) list += "[";
    s.set_json_schema(list);
  });
  add([](auto& s) {  // 2^40 alternatives
    std::string grammar = "root ::= r0\n";
    for (int i = 0; i < 40; ++i) grammar += absl::StrCat("r", i, " ::= r", i + 1, " r", i + 1, " | r", i + 1, " \"a\"\n");
    s.set_grammar(grammar + "r40 ::= \"x\"{0,100000}\n");
  });
  may_compile.back() = true;
  add([](auto& s) { s.set_grammar("root ::= root root | \"a\"\n"); });
  may_compile.back() = true;  // ambiguous, and yet small
  add([](auto& s) { s.set_grammar("root ::= root root | root\n"); });
  may_compile.back() = true;
  v1::GenerateRequest stream = Good();
  stream.mutable_stop()->set_max_tokens(100);
  stream.mutable_stop()->set_ignore_eos(true);
  const Heard alone = Generate(*stub_, stream);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < bombs.size(); ++i) {
    threads.emplace_back([&, i] {
      const Heard heard = Generate(*stub_, bombs[i]);
      SCOPED_TRACE(bombs[i].structured().ShortDebugString().substr(0, 60));
      if (may_compile[i] && heard.status.ok()) return;
      EXPECT_EQ(heard.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << heard.status.error_message();
      EXPECT_THAT(heard.status.error_message(), HasSubstr("structured.")) << heard.status.error_message();
    });
  }
  for (int i = 0; i < 5; ++i) EXPECT_EQ(Generate(*stub_, stream).token_ids(), alone.token_ids());
  for (std::thread& thread : threads) thread.join();
  v1::GenerateRequest good = Good();
  good.mutable_structured()->set_regex("[0-9]{3}");
  const Heard heard = Generate(*stub_, good);
  EXPECT_TRUE(heard.status.ok()) << heard.status.error_message();
  EXPECT_EQ(heard.text().size(), 3u);
}

TEST_F(BadInputTest, AFloodOfMetadataIsRefusedOrIgnored) {
  for (const int entries : {1, 100, 10'000}) {
    for (const int bytes : {10, 100'000}) {
      if (entries * bytes > 20'000'000) continue;
      grpc::ClientContext context;
      for (int i = 0; i < entries; ++i) context.AddMetadata(absl::StrCat("x-", i), std::string(static_cast<size_t>(bytes), 'm'));
      // A connection of its own: gRPC may close it.
      const auto own = v1::Inference::NewStub(Connect(server_->port()));
      const auto reader = own->Generate(&context, Good());
      const Heard heard = HearOut(*reader);
      SCOPED_TRACE(absl::StrCat(entries, " entries of ", bytes, " bytes: ", heard.status.error_message()));
      if (entries * bytes <= 1000) {
        EXPECT_TRUE(heard.status.ok());
      } else {
        // The call is refused, or, where the flood does not fit gRPC's buffers, its connection closed.
        EXPECT_THAT(heard.status.error_code(),
                    ::testing::AnyOf(grpc::StatusCode::RESOURCE_EXHAUSTED, grpc::StatusCode::UNAVAILABLE));
      }
    }
  }
}

}  // namespace
}  // namespace memserve::server
