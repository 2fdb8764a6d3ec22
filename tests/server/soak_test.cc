// Thousands of calls from many clients at once: a third leave at random points, a tenth ask for what cannot be, some do not read.
// What ends as it should is what it would be alone, and nothing is left behind.
#include <atomic>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "engine/engine.h"
#include "engine/start_report.h"
#include "gtest/gtest.h"
#include "tests/server/harness.h"
#include "tests/support/golden.h"

namespace memserve::server {
namespace {

std::vector<v1::GenerateRequest> Kinds(const testing::GoldenCase& golden) {
  std::vector<v1::GenerateRequest> kinds;
  for (int i = 0; i < 24; ++i) {
    const std::vector<int32_t>& tokens = golden.sequences[i % golden.sequences.size()].tokens;
    v1::GenerateRequest request;
    request.mutable_tokens()->mutable_ids()->Assign(tokens.begin(), tokens.begin() + 1 + i * 5 % static_cast<int>(tokens.size()));
    request.mutable_stop()->set_max_tokens(1 + i * 7 % 60);
    request.mutable_stop()->set_ignore_eos(true);
    request.mutable_output()->set_logprobs(true);
    request.mutable_sampling()->set_seed(i);
    if (i % 2 == 0) request.mutable_sampling()->set_temperature(0.9f);
    if (i % 4 == 1) request.set_n(3);
    if (i % 5 == 2) request.mutable_speculation();
    if (i % 6 == 3) request.mutable_memory()->set_enabled(false);
    if (i % 7 == 4) request.mutable_output()->set_top_logprobs(5);
    kinds.push_back(std::move(request));
  }
  return kinds;
}

v1::GenerateRequest Wrong(v1::GenerateRequest request, unsigned way) {
  switch (way % 6) {
    case 0:
      request.mutable_tokens()->add_ids(-7);
      break;
    case 1:
      request.mutable_sampling()->set_top_p(-1);
      break;
    case 2:
      for (int i = 0; i < 10000; ++i) request.mutable_stop()->add_strings("x");
      break;
    case 3:
      request.clear_prompt();
      break;
    case 4:
      request.set_model("another");
      break;
    case 5:
      (*request.mutable_sampling()->mutable_logit_bias())[1 << 29] = 1;
      break;
  }
  return request;
}

// What is said, in the order of the choices: deltas are joined or not as the reader is fast or slow.
struct Answer {
  std::vector<std::string> texts = std::vector<std::string>(8);
  std::vector<std::vector<int32_t>> ids = std::vector<std::vector<int32_t>>(8);
  std::vector<std::vector<float>> logprobs = std::vector<std::vector<float>>(8);
  bool operator==(const Answer&) const = default;

  void Add(const v1::GenerateResponse& message) {
    const v1::Delta& delta = message.delta();
    const int choice = message.has_finished() ? message.finished().choice() : delta.choice();
    texts.at(choice) += message.has_finished() ? message.finished().text() : delta.text();
    ids[choice].insert(ids[choice].end(), delta.token_ids().begin(), delta.token_ids().end());
    logprobs[choice].insert(logprobs[choice].end(), delta.logprobs().begin(), delta.logprobs().end());
  }
};

Answer Ask(v1::Inference::Stub& stub, const v1::GenerateRequest& request, grpc::Status* status, int leave_after = 0) {
  grpc::ClientContext context;
  const std::unique_ptr<grpc::ClientReader<v1::GenerateResponse>> reader = stub.Generate(&context, request);
  Answer answer;
  v1::GenerateResponse message;
  for (int heard = 1; reader->Read(&message); ++heard) {
    answer.Add(message);
    if (heard == leave_after) context.TryCancel();
  }
  *status = reader->Finish();
  return answer;
}

void Soak(int calls) {
  constexpr int kClients = 40, kStalled = 4;
  const testing::GoldenCase golden = testing::LoadGolden("A");
  engine::EngineOptions engine_options = testing::ParityOptions(golden.checkpoint);
  engine_options.kv_cache_bytes = 1 << 20;
  engine_options.max_sequences = 24;
  auto engine = engine::Engine::Create(engine_options);
  ASSERT_TRUE(engine.ok()) << engine.status();
  ServerOptions options = OnAnyPort();
  options.max_unread_bytes = 64 << 10;
  auto server = Server::Listen(options);
  ASSERT_TRUE(server.ok()) << server.status();
  ASSERT_TRUE((*server)->Serve(*std::move(engine)).ok());
  const int port = (*server)->port();
  const auto stub = v1::Inference::NewStub(Connect(port));
  const std::vector<v1::GenerateRequest> kinds = Kinds(golden);
  std::vector<Answer> solo;
  for (const v1::GenerateRequest& request : kinds) {
    grpc::Status status;
    solo.push_back(Ask(*stub, request, &status));
    ASSERT_TRUE(status.ok()) << status.error_message();
  }

  std::atomic<int> next{0}, equal{0}, different{0}, left{0}, refused{0}, other{0}, stopped{0};
  std::atomic<int64_t> resident_early{0};
  std::vector<std::thread> clients;
  for (int c = 0; c < kClients; ++c) {
    clients.emplace_back([&, c] {
      const auto own = c % 4 == 0 ? v1::Inference::NewStub(Connect(port)) : nullptr;
      v1::Inference::Stub& use = own != nullptr ? *own : *stub;
      std::mt19937 random(c);
      for (int i = next++; i < calls; i = next++) {
        if (i == calls / 4) resident_early = engine::ResidentBytes("VmRSS") / 1024;
        const size_t kind = random() % kinds.size();
        const bool wrong = random() % 10 == 0;
        const int leave_after = random() % 3 == 0 ? 1 + static_cast<int>(random() % 12) : 0;
        grpc::Status status;
        const Answer answer = Ask(use, wrong ? Wrong(kinds[kind], random()) : kinds[kind], &status, leave_after);
        if (status.ok()) {
          ++(!wrong && answer == solo[kind] ? equal : different);
        } else if (status.error_code() == grpc::StatusCode::CANCELLED) {
          ++left;
        } else if (status.error_code() == grpc::StatusCode::INVALID_ARGUMENT ||
                   status.error_code() == grpc::StatusCode::NOT_FOUND) {
          ++refused;
        } else {
          ++other;
          ADD_FAILURE() << status.error_code() << ": " << status.error_message();
        }
      }
    });
  }
  // Readers that do not read, each on a connection of its own, from now until all others are done.
  std::vector<std::thread> stalled;
  std::atomic<bool> done{false};
  for (int s = 0; s < kStalled; ++s) {
    stalled.emplace_back([&] {
      v1::GenerateRequest request = kinds[0];
      request.set_n(8);
      request.mutable_stop()->set_max_tokens(200);
      request.mutable_output()->set_top_logprobs(20);
      const auto own = v1::Inference::NewStub(Connect(port));
      grpc::ClientContext context;
      const auto reader = own->Generate(&context, request);
      while (!done) std::this_thread::sleep_for(std::chrono::milliseconds(20));
      v1::GenerateResponse message;
      while (reader->Read(&message)) {
      }
      stopped += reader->Finish().error_code() == grpc::StatusCode::RESOURCE_EXHAUSTED ? 1 : 0;
    });
  }
  for (std::thread& client : clients) client.join();
  done = true;
  for (std::thread& reader : stalled) reader.join();
  EXPECT_EQ(different, 0);
  EXPECT_EQ(other, 0);
  EXPECT_EQ(equal + left + refused, calls);
  EXPECT_GT(equal, calls / 2);
  EXPECT_GT(left, calls / 10);
  EXPECT_GT(refused, calls / 25);
  EXPECT_EQ(stopped, kStalled) << "readers that do not read are stopped";
  v1::GetLoadResponse load;
  for (int i = 0; i < 2000; ++i) {
    grpc::ClientContext context;
    ASSERT_TRUE(stub->GetLoad(&context, {}, &load).ok());
    if (load.kv_pages_used() == 0 && load.requests() == 0) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_EQ(load.kv_pages_used(), 0);
  EXPECT_EQ(load.running() + load.waiting() + load.requests(), 0);
  const int64_t growth = engine::ResidentBytes("VmRSS") / 1024 - resident_early;
  EXPECT_LT(growth, 24 << 10) << "KiB since a quarter of the calls";
  std::printf("%d calls: %d equal to their solo run, %d left, %d refused, %d stalled readers stopped; %ld KiB grown\n", calls,
              equal.load(), left.load(), refused.load(), stopped.load(), static_cast<long>(growth));
}

TEST(ServerSoakTest, AThousandCallsLeaveNothingBehind) { Soak(1000); }
TEST(ServerSoakLongTest, TenThousandCallsLeaveNothingBehind) { Soak(10000); }

}  // namespace
}  // namespace memserve::server
