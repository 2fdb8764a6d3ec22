// memserve.v1.Memory, and what requests say about the memory: against a fake engine, and against the real one on a reference case.
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine/engine.h"
#include "gmock/gmock.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"
#include "tests/server/fake_engine.h"
#include "tests/server/harness.h"
#include "tests/support/golden.h"

namespace memserve::server {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

template <typename Message>
Message Parse(const std::string& text) {
  Message message;
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(text, &message)) << text;
  return message;
}

class MemoryServiceTest : public ::testing::Test {
 protected:
  void Serve(std::unique_ptr<engine::Engine> engine) {
    auto server = Server::Listen(OnAnyPort());
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    ASSERT_TRUE(server_->Serve(std::move(engine)).ok());
    channel_ = Connect(server_->port());
    memory_ = v1::Memory::NewStub(channel_);
    inference_ = v1::Inference::NewStub(channel_);
  }
  void ServeFake() {
    auto engine = std::make_unique<FakeEngine>();
    fake_ = engine.get();
    Serve(std::move(engine));
  }
  void ServeGolden(const std::string& name) {
    golden_ = testing::LoadGolden(name);
    auto engine = engine::Engine::Create(testing::ParityOptions(golden_.checkpoint));
    ASSERT_TRUE(engine.ok()) << engine.status();
    Serve(*std::move(engine));
  }

  template <typename Request, typename Response>
  grpc::Status Call(grpc::Status (v1::Memory::Stub::*method)(grpc::ClientContext*, const Request&, Response*),
                    const Request& request, Response& response) {
    grpc::ClientContext context;
    return ((*memory_).*method)(&context, request, &response);
  }

  FakeEngine* fake_ = nullptr;
  testing::GoldenCase golden_;
  std::unique_ptr<Server> server_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::Memory::Stub> memory_;
  std::unique_ptr<v1::Inference::Stub> inference_;
};

TEST_F(MemoryServiceTest, GetTableTellsEachTableOnceOrThatOfALayer) {
  ServeFake();
  v1::GetTableResponse response;
  ASSERT_TRUE(Call(&v1::Memory::Stub::GetTable, v1::GetTableRequest(), response).ok());
  ASSERT_EQ(response.tables_size(), 1);
  EXPECT_THAT(response.tables(0).layers(), ElementsAre(1, 4));
  EXPECT_EQ(response.tables(0).bytes(), int64_t{1} << 31);
  ASSERT_TRUE(Call(&v1::Memory::Stub::GetTable, Parse<v1::GetTableRequest>("layer: 4"), response).ok());
  EXPECT_EQ(response.tables_size(), 1);
  const grpc::Status status = Call(&v1::Memory::Stub::GetTable, Parse<v1::GetTableRequest>("layer: 2"), response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(status.error_message(), "layer: 2 has no memory; these do: 1, 4");
}

TEST_F(MemoryServiceTest, GetRowsAndRowStatsSayWhatTheEngineSays) {
  ServeFake();
  v1::GetRowsResponse rows;
  ASSERT_TRUE(Call(&v1::Memory::Stub::GetRows, Parse<v1::GetRowsRequest>("rows: [7, 2]"), rows).ok());
  EXPECT_EQ(rows.DebugString(),
            Parse<v1::GetRowsResponse>("rows { row: 7 values: [70, 71] } rows { row: 2 values: [20, 21] }").DebugString());
  EXPECT_EQ(Call(&v1::Memory::Stub::GetRows, v1::GetRowsRequest(), rows).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  v1::RowStatsResponse stats;
  ASSERT_TRUE(
      Call(&v1::Memory::Stub::RowStats, Parse<v1::RowStatsRequest>("layer: 4 top: 2 rows: [9, 5] reset: true"), stats).ok());
  EXPECT_EQ(stats.DebugString(), Parse<v1::RowStatsResponse>(R"(
      table_rows: 1048576 reads: 4 distinct_rows: 1 top { row: 0 count: 100 } top { row: 1 count: 99 }
      rows { row: 9 count: 9 } rows { row: 5 count: 5 } since_seconds: 3)")
                                     .DebugString());
  ASSERT_TRUE(Call(&v1::Memory::Stub::RowStats, v1::RowStatsRequest(), stats).ok());
  EXPECT_EQ(stats.top_size(), 10);
  EXPECT_EQ(stats.distinct_rows(), 0) << "not reset unasked";
}

TEST_F(MemoryServiceTest, ModesAndTracesReachTheEngine) {
  ServeFake();
  fake_->on_generate = [this](const FakeEngine::Generation& generation) {
    const engine::GenerateRequest& request = generation.request;
    EXPECT_EQ(request.memory.knn, 5);
    EXPECT_THAT(request.memory.layers, ElementsAre(4));
    EXPECT_THAT(request.memory.masked_rows, ElementsAre(7, 3));
    ASSERT_TRUE(request.memory_trace.has_value());
    EXPECT_EQ(request.memory_trace->tokens, 0);
    EXPECT_EQ(request.memory_trace->prompt_tokens, 2);
    EXPECT_EQ(request.memory_trace->entries, 3);
    EXPECT_THAT(request.memory_trace->layers, ElementsAre(1));
    generation.listener->OnDelta(
        {.token_ids = {9},
         .memory_traces = {{.position = 6,
                            .token_id = 8,
                            .layers = {{.layer = 1, .heads = {0, 3}, .rows = {11, 12}, .weights = {0.5f, 0.25f}}}}}});
    fake_->End(generation, engine::Finished{});
  };
  const Heard heard = Generate(*inference_, Parse<v1::GenerateRequest>(R"(
      text: "x" memory { knn: 5 layers: 4 masked_rows: [7, 3] }
      output { memory_trace { tokens: 0 prompt_tokens: 2 entries: 3 layers: 1 } })"));
  ASSERT_TRUE(heard.status.ok()) << heard.status.error_message();
  EXPECT_EQ(heard.deltas.at(0).memory_traces(0).DebugString(), Parse<v1::TokenTrace>(R"(
      position: 6 token_id: 8 layers { layer: 1 heads: [0, 3] rows: [11, 12] weights: [0.5, 0.25] })")
                                                                   .DebugString());

  fake_->on_generate = [this](const FakeEngine::Generation& generation) {
    EXPECT_FALSE(generation.request.memory.knn.has_value());
    EXPECT_FALSE(generation.request.memory_trace.has_value());
    fake_->End(generation, engine::Finished{});
  };
  EXPECT_TRUE(Generate(*inference_, Parse<v1::GenerateRequest>(R"(text: "x" memory {} output {})")).status.ok());
}

TEST_F(MemoryServiceTest, BadModesAndTracesAreNamed) {
  ServeFake();
  for (const auto& [request, message] : std::vector<std::pair<std::string, std::string>>{
           {"memory { knn: 0 }", "memory.knn: 0 is not in [1, 32]"},
           {"memory { knn: 33 }", "memory.knn: 33 is not in [1, 32]"},
           {"memory { layers: 2 }", "memory.layers: layer 2 has no memory; these do: 1, 4"},
           {"memory { masked_rows: 1048576 }", "memory.masked_rows: row 1048576 at index 0 is not in [0, 1048576)"},
           {"output { memory_trace { entries: 0 } }", "memory_trace.entries: 0 is not in [1, 32]"},
           {"output { memory_trace { layers: 3 } }", "memory_trace.layers: layer 3 has no memory; these do: 1, 4"},
           {"output { memory_trace { prompt_tokens: -1 } }", "memory_trace.prompt_tokens: -1 is not at least 0"},
       }) {
    const Heard heard = Generate(*inference_, Parse<v1::GenerateRequest>("text: 'x' " + request));
    EXPECT_EQ(heard.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << request;
    EXPECT_EQ(heard.status.error_message(), message);
  }
  v1::TraceResponse response;
  EXPECT_THAT(Call(&v1::Memory::Stub::Trace, v1::TraceRequest(), response).error_message(), HasSubstr("prompt is not set"));
}

TEST_F(MemoryServiceTest, ACallOfTraceThatIsCancelledCancelsItsRequest) {
  ServeFake();
  grpc::ClientContext context;
  grpc::Status status;
  v1::TraceResponse response;
  std::thread client([&] { status = memory_->Trace(&context, Parse<v1::TraceRequest>("request_id: 't' text: 'x'"), &response); });
  const FakeEngine::Generation generation = fake_->NextGeneration();
  EXPECT_EQ(generation.request.stop.max_tokens, 1);
  context.TryCancel();
  const bool cancelled = fake_->WaitForCancel("t");
  EXPECT_TRUE(cancelled);
  if (!cancelled) fake_->End(generation, absl::CancelledError(""));
  client.join();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(MemoryServiceTest, AModelWithoutMemorySaysSo) {
  ServeGolden("E");
  v1::GetTableResponse tables;
  v1::GetRowsResponse rows;
  v1::RowStatsResponse stats;
  v1::TraceResponse trace;
  EXPECT_EQ(Call(&v1::Memory::Stub::GetTable, v1::GetTableRequest(), tables).error_code(), grpc::StatusCode::UNIMPLEMENTED);
  EXPECT_EQ(Call(&v1::Memory::Stub::GetRows, Parse<v1::GetRowsRequest>("rows: 1"), rows).error_code(),
            grpc::StatusCode::UNIMPLEMENTED);
  EXPECT_EQ(Call(&v1::Memory::Stub::RowStats, v1::RowStatsRequest(), stats).error_code(), grpc::StatusCode::UNIMPLEMENTED);
  EXPECT_EQ(Call(&v1::Memory::Stub::Trace, Parse<v1::TraceRequest>("tokens { ids: 1 }"), trace).error_code(),
            grpc::StatusCode::UNIMPLEMENTED);
}

TEST_F(MemoryServiceTest, ATraceIsThatOfTheOriginalAndIsCounted) {
  ServeGolden("A");
  const testing::GoldenSequence& sequence = golden_.sequences[0];
  v1::TraceRequest request;
  request.mutable_tokens()->mutable_ids()->Assign(sequence.tokens.begin(), sequence.tokens.end());
  v1::TraceResponse trace;
  const grpc::Status status = Call(&v1::Memory::Stub::Trace, request, trace);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_EQ(trace.tokens_size(), static_cast<int>(sequence.tokens.size()));
  EXPECT_EQ(trace.usage().prompt_tokens(), trace.tokens_size());
  std::map<int32_t, uint32_t> counts;
  uint64_t reads = 0;
  const std::vector<int32_t> layers = {1, 4};
  for (size_t m = 0; m < layers.size(); ++m) {
    const std::string prefix = sequence.name + ".layer" + std::to_string(layers[m]) + ".memory.";
    const std::vector<int32_t> rows = golden_.Ints(prefix + "indices");
    const std::vector<float> weights = golden_.Floats(prefix + "weights");
    const size_t bag = rows.size() / sequence.tokens.size();
    for (size_t t = 0; t < sequence.tokens.size(); ++t) {
      const v1::LayerTrace& layer = trace.tokens(static_cast<int>(t)).layers(static_cast<int>(m));
      ASSERT_EQ(layer.layer(), layers[m]);
      ASSERT_EQ(layer.rows_size(), static_cast<int>(bag));
      std::vector<int32_t> found(layer.rows().begin(), layer.rows().end()),
          expected(rows.begin() + t * bag, rows.begin() + (t + 1) * bag);
      double sum = 0;
      for (size_t i = 0; i < bag; ++i) sum += weights[t * bag + i] - layer.weights(static_cast<int>(i));
      EXPECT_NEAR(sum, 0, 1e-4);
      for (int32_t row : expected) ++counts[row];
      std::sort(found.begin(), found.end());
      std::sort(expected.begin(), expected.end());
      EXPECT_EQ(found, expected) << prefix << " token " << t;
      reads += bag;
    }
  }
  v1::RowStatsRequest ask;
  for (const auto& [row, count] : counts) {
    if (ask.rows_size() < 1000) ask.add_rows(row);
  }
  v1::RowStatsResponse stats;
  ASSERT_TRUE(Call(&v1::Memory::Stub::RowStats, ask, stats).ok());
  EXPECT_EQ(stats.reads(), reads);
  EXPECT_EQ(stats.distinct_rows(), static_cast<int64_t>(counts.size()));
  for (const v1::RowCount& row : stats.rows()) EXPECT_EQ(row.count(), counts[row.row()]) << row.row();

  v1::GetRowsResponse rows;
  ASSERT_TRUE(Call(&v1::Memory::Stub::GetRows, Parse<v1::GetRowsRequest>("layer: 4 rows: [0, 1023]"), rows).ok());
  ASSERT_EQ(rows.rows_size(), 2);
  EXPECT_EQ(rows.rows(1).row(), 1023);
  EXPECT_EQ(rows.rows(1).values_size(), 64);
  EXPECT_THAT(rows.rows(1).experts(), IsEmpty());

  request.mutable_memory_trace()->set_prompt_tokens(2);
  request.mutable_memory_trace()->set_entries(1);
  v1::TraceResponse last;
  ASSERT_TRUE(Call(&v1::Memory::Stub::Trace, request, last).ok());
  ASSERT_EQ(last.tokens_size(), 2);
  EXPECT_EQ(last.tokens(1).position(), static_cast<int>(sequence.tokens.size()) - 1);
  EXPECT_EQ(last.tokens(1).token_id(), sequence.tokens.back());
}

}  // namespace
}  // namespace memserve::server
