// The server's life: loading, ready, draining, gone.
#include <cstdio>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/server/fake_engine.h"
#include "tests/server/harness.h"

namespace memserve::server {
namespace {

using ::testing::HasSubstr;

std::unique_ptr<Server> ListenOrDie(const ServerOptions& options = OnAnyPort()) {
  auto server = Server::Listen(options);
  EXPECT_TRUE(server.ok()) << server.status();
  return *std::move(server);
}

// grpc.health.v1, by hand: Debian ships no stub. HealthCheckRequest.service is field 1; HealthCheckResponse.status too.
std::string Health(int port, const std::string& service) {
  grpc::GenericStub stub(Connect(port));
  grpc::CompletionQueue queue;
  grpc::ClientContext context;
  const grpc::Slice slice(std::string("\x0a") + static_cast<char>(service.size()) + service);
  auto call = stub.PrepareUnaryCall(&context, "/grpc.health.v1.Health/Check", grpc::ByteBuffer(&slice, 1), &queue);
  grpc::ByteBuffer answer;
  grpc::Status status;
  call->StartCall();
  call->Finish(&answer, &status, &queue);
  void* tag = nullptr;
  bool ok = false;
  queue.Next(&tag, &ok);
  if (!status.ok()) return absl::StrCat("error ", status.error_code());
  std::vector<grpc::Slice> slices;
  EXPECT_TRUE(answer.Dump(&slices).ok());
  if (slices.empty() || slices[0].size() != 2) return "unknown";
  return slices[0].begin()[1] == 1 ? "serving" : "not serving";
}

TEST(ServerTest, WhileLoadingItIsAliveAndNotReady) {
  const auto server = ListenOrDie();
  EXPECT_EQ(Health(server->port(), ""), "serving");
  EXPECT_EQ(Health(server->port(), "memserve.v1.Inference"), "not serving");
  EXPECT_EQ(Health(server->port(), "nonsense"), "error 5");
  const auto stub = v1::Inference::NewStub(Connect(server->port()));
  const Heard heard = Generate(*stub, Ask("x"));
  EXPECT_EQ(heard.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(heard.status.error_message(), HasSubstr("loading"));
  grpc::ClientContext model_call, load_call, abort_call, score_call, tokenize_call, tables_call;
  v1::GetModelResponse model;
  EXPECT_EQ(stub->GetModel(&model_call, {}, &model).error_code(), grpc::StatusCode::UNAVAILABLE);
  v1::GetLoadResponse load;
  EXPECT_EQ(stub->GetLoad(&load_call, {}, &load).error_code(), grpc::StatusCode::UNAVAILABLE);
  v1::AbortResponse abort;
  EXPECT_EQ(stub->Abort(&abort_call, {}, &abort).error_code(), grpc::StatusCode::UNAVAILABLE);
  v1::ScoreResponse score;
  EXPECT_EQ(stub->Score(&score_call, {}, &score).error_code(), grpc::StatusCode::UNAVAILABLE);
  v1::TokenizeResponse tokenize;
  EXPECT_EQ(stub->Tokenize(&tokenize_call, {}, &tokenize).error_code(), grpc::StatusCode::UNAVAILABLE);
  v1::GetTableResponse tables;
  EXPECT_EQ(v1::Memory::NewStub(Connect(server->port()))->GetTable(&tables_call, {}, &tables).error_code(),
            grpc::StatusCode::UNAVAILABLE);
}

TEST(ServerTest, ReadinessFallsWhileTheEngineMakesNoStepAlthoughRequestsWait) {
  ServerOptions options = OnAnyPort();
  options.stall_seconds = 5;
  const auto server = ListenOrDie(options);
  auto owned = std::make_unique<FakeEngine>();
  FakeEngine& engine = *owned;
  ASSERT_TRUE(server->Serve(std::move(owned)).ok());
  const auto ready_at = [&](int second) {
    server->WatchProgress(absl::UnixEpoch() + absl::Seconds(second));
    return Health(server->port(), "memserve.v1.Inference") == "serving";
  };
  EXPECT_TRUE(ready_at(0));
  EXPECT_TRUE(ready_at(100)) << "nothing waits";
  engine.load_now = {.requests = 1, .steps = 7};
  EXPECT_TRUE(ready_at(101));
  EXPECT_TRUE(ready_at(106)) << "the limit is not passed";
  EXPECT_FALSE(ready_at(107));
  EXPECT_EQ(Health(server->port(), ""), "serving") << "alive all the same";
  engine.load_now.steps = 8;
  EXPECT_TRUE(ready_at(120)) << "it moves again";
  EXPECT_FALSE(ready_at(126));
  engine.load_now.ended_requests = 1;
  EXPECT_TRUE(ready_at(127)) << "a request ended";
  EXPECT_FALSE(ready_at(133));
  engine.load_now.requests = 0;
  EXPECT_TRUE(ready_at(134)) << "nothing waits any more";
}

TEST(ServerTest, OnceItHasAnEngineItIsReadyAndSaysItsPort) {
  ServerOptions options = OnAnyPort();
  options.port_file = ::testing::TempDir() + "/memserve_server_test_port";
  std::ofstream(options.port_file) << "1\n";  // of an earlier server
  const auto server = ListenOrDie(options);
  EXPECT_FALSE(std::ifstream(options.port_file).good());
  ASSERT_TRUE(server->Serve(std::make_unique<FakeEngine>()).ok());
  int port = 0;
  std::ifstream(options.port_file) >> port;
  EXPECT_EQ(port, server->port());
  EXPECT_EQ(Health(port, "memserve.v1.Inference"), "serving");
  EXPECT_EQ(Health(port, "memserve.v1.Memory"), "serving");
  std::remove(options.port_file.c_str());
}

TEST(ServerTest, APortFileThatCannotBeWrittenIsAnError) {
  ServerOptions options = OnAnyPort();
  options.port_file = "/nowhere/port";
  const absl::Status status = ListenOrDie(options)->Serve(std::make_unique<FakeEngine>());
  EXPECT_THAT(status.message(), HasSubstr("\"/nowhere/port\""));
}

TEST(ServerTest, APortInUseIsAnErrorThatNamesIt) {
  const auto first = ListenOrDie();
  ServerOptions options = OnAnyPort();
  options.grpc_address = absl::StrCat("127.0.0.1:", first->port());
  const auto second = Server::Listen(options);
  ASSERT_FALSE(second.ok());
  EXPECT_TRUE(absl::IsUnavailable(second.status()));
  EXPECT_THAT(second.status().message(), HasSubstr(options.grpc_address));
}

TEST(ServerTest, DrainingRefusesNewWorkAndFinishesWhatRuns) {
  auto owned = std::make_unique<FakeEngine>();
  FakeEngine* const engine = owned.get();
  const auto server = ListenOrDie();
  ASSERT_TRUE(server->Serve(std::move(owned)).ok());
  const auto stub = v1::Inference::NewStub(Connect(server->port()));
  grpc::ClientContext context;
  auto reader = stub->Generate(&context, Ask("x"));
  FakeEngine::Generation generation = engine->NextGeneration();

  std::thread drain([&] { server->Drain(absl::Hours(1)); });
  ASSERT_TRUE(engine->WaitForDrain());
  EXPECT_EQ(Health(server->port(), "memserve.v1.Inference"), "not serving");
  EXPECT_EQ(Health(server->port(), ""), "serving");
  const Heard refused = Generate(*stub, Ask("y"));
  EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(refused.status.error_message(), HasSubstr("draining"));
  grpc::ClientContext load_call;
  v1::GetLoadResponse load;
  EXPECT_TRUE(stub->GetLoad(&load_call, {}, &load).ok());

  // The last words are still waiting for their reader when the engine has nothing left.
  generation.listener->OnDelta({.text = std::string(2 << 20, 'x')});
  generation.listener->OnDelta({.text = "last words"});
  engine->End(generation, engine::Finished{});
  generation.listener.reset();
  const Heard heard = HearOut(*reader);
  drain.join();
  EXPECT_TRUE(heard.status.ok()) << heard.status.error_message();
  EXPECT_EQ(heard.text().size(), (2u << 20) + 10);
}

TEST(ServerTest, ASecondDrainCutsTheFirstShort) {
  auto owned = std::make_unique<FakeEngine>();
  FakeEngine* const engine = owned.get();
  const auto server = ListenOrDie();
  ASSERT_TRUE(server->Serve(std::move(owned)).ok());
  const auto stub = v1::Inference::NewStub(Connect(server->port()));
  grpc::ClientContext context, stalled_context;
  auto reader = stub->Generate(&context, Ask("x"));
  const FakeEngine::Generation generation = engine->NextGeneration();
  auto stalled = stub->Generate(&stalled_context, Ask("y"));  // its reader never reads
  engine->NextGeneration().listener->OnDelta({.text = std::string(2 << 20, 'x')});

  std::thread drain([&] { server->Drain(absl::Hours(1)); });
  ASSERT_TRUE(engine->WaitForDrain());
  server->Drain(absl::ZeroDuration());
  drain.join();
  EXPECT_EQ(HearOut(*reader).status.error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST(ServerTest, GoingAwayEndsWhatRuns) {
  auto owned = std::make_unique<FakeEngine>();
  FakeEngine* const engine = owned.get();
  auto server = ListenOrDie();
  ASSERT_TRUE(server->Serve(std::move(owned)).ok());
  const auto stub = v1::Inference::NewStub(Connect(server->port()));
  grpc::ClientContext context;
  auto reader = stub->Generate(&context, Ask("x"));
  engine->NextGeneration();
  server.reset();
  EXPECT_FALSE(HearOut(*reader).status.ok());
}

TEST(ServerTest, TheEnginesFailureIsTheServers) {
  auto owned = std::make_unique<FakeEngine>();
  FakeEngine* const engine = owned.get();
  const auto server = ListenOrDie();
  ASSERT_TRUE(server->Serve(std::move(owned)).ok());
  EXPECT_TRUE(server->status().ok());
  engine->Fail(absl::InternalError("the device is gone"));
  EXPECT_EQ(server->status().message(), "the device is gone");
}

}  // namespace
}  // namespace memserve::server
