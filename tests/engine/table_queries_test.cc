// Values of rows, and how often they are read.

#include "engine/table_queries.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <future>
#include <map>
#include <random>

#include "engine/engine.h"
#include "kernels/tensor.h"
#include "tests/support/collector.h"
#include "tests/support/engines.h"
#include "tests/support/files.h"
#include "tests/support/golden.h"

namespace memserve::engine {
namespace {

using ::testing::ElementsAre;
using testing::Generate;
using testing::GenerateAll;
using testing::Generated;
using testing::GoldenCase;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::LoadGolden;
using ::testing::Pair;
using testing::ParityOptions;
using testing::Start;

EngineOptions Options(const GoldenCase& golden, int ranks = 1) {
  EngineOptions options = ParityOptions(golden.checkpoint);
  options.devices.clear();
  for (int r = 0; r < ranks; ++r) options.devices.push_back(r);
  return options;
}

absl::StatusOr<TableRows> Read(Engine& engine, const ReadRowsRequest& request) {
  std::promise<absl::StatusOr<TableRows>> promise;
  engine.ReadRows(request, [&](absl::StatusOr<TableRows> rows) { promise.set_value(std::move(rows)); });
  return promise.get_future().get();
}

absl::StatusOr<RowStats> Count(Engine& engine, const RowStatsRequest& request) {
  std::promise<absl::StatusOr<RowStats>> promise;
  engine.CountRows(request, [&](absl::StatusOr<RowStats> stats) { promise.set_value(std::move(stats)); });
  return promise.get_future().get();
}

std::vector<float> TensorOf(const GoldenCase& golden, const std::string& name) {
  const testing::StoredTensor tensor = testing::ReadTensors(golden.checkpoint + "/model.safetensors").at(name);
  std::vector<float> values;
  for (size_t i = 0; i < tensor.bytes.size() && tensor.dtype == "BF16"; i += 2) {
    kernels::BFloat16 value;
    std::memcpy(&value, tensor.bytes.data() + i, 2);
    values.push_back(kernels::ToFloat(value));
  }
  if (tensor.dtype == "F32") {
    values.resize(tensor.bytes.size() / 4);
    std::memcpy(values.data(), tensor.bytes.data(), tensor.bytes.size());
  }
  return values;
}

std::vector<float> RowsOf(const std::vector<float>& table, int64_t dim, const std::vector<int32_t>& rows) {
  std::vector<float> values;
  for (int32_t row : rows) values.insert(values.end(), table.begin() + row * dim, table.begin() + (row + 1) * dim);
  return values;
}

TEST(TableQueriesTest, RowsAreThoseOfTheCheckpointWithTheColumnsOfAllRanks) {
  for (const char* name : {"A", "B", "D", "F"}) {
    const GoldenCase golden = LoadGolden(name);
    for (int ranks : {1, 2, 3}) {
      EngineOptions options = Options(golden, ranks);
      if (ranks == 2) options.max_batch_tokens = 2;  // fewer than the rows asked for
      const std::unique_ptr<Engine> engine = Start(options);
      for (const ValueTableInfo& table : engine->model().value_tables) {
        const auto last = static_cast<int32_t>(table.rows - 1);
        const ReadRowsRequest request = {.layer = table.layers.back(), .rows = {last, 0, 17, 0}};
        const absl::StatusOr<TableRows> found = Read(*engine, request);
        ASSERT_TRUE(found.ok()) << found.status();
        ASSERT_EQ(found->dim, table.dim);
        EXPECT_EQ(found->values.size(), 4u * table.dim);
        std::string values = table.name, experts = table.name;
        if (const size_t u = table.name.find("values_u"); u != std::string::npos) values.replace(u, 8, "values_v");
        EXPECT_TRUE(found->values == RowsOf(TensorOf(golden, values), table.dim, request.rows)) << name << " on " << ranks;
        if (values == experts)
          EXPECT_THAT(found->experts, IsEmpty());
        else
          EXPECT_TRUE(found->experts == RowsOf(TensorOf(golden, experts), table.dim, request.rows)) << name << " on " << ranks;
      }
    }
  }
}

TEST(TableQueriesTest, RowsOfAQuantisedTableAreWhatTheirCodesStandFor) {
  const GoldenCase golden = LoadGolden("A");
  for (const auto& [dtype, most] : std::vector<std::pair<std::string, float>>{{"int8", 127}, {"int4", 7}}) {
    EngineOptions options = Options(golden, 2);
    options.table_dtype = dtype;
    const std::unique_ptr<Engine> engine = Start(options);
    const ReadRowsRequest request = {.rows = {3, 1000}};
    const TableRows found = Read(*engine, request).value();
    const std::vector<float> exact = RowsOf(TensorOf(golden, engine->model().value_tables[0].name), found.dim, request.rows);
    ASSERT_EQ(found.values.size(), exact.size());
    for (size_t row = 0; row < 2; ++row) {
      float largest = 0;
      for (int64_t c = 0; c < found.dim; ++c) largest = std::max(largest, std::abs(exact[row * found.dim + c]));
      for (int64_t c = 0; c < found.dim; ++c) {
        EXPECT_NEAR(found.values[row * found.dim + c], exact[row * found.dim + c], 0.5001f * largest / most) << dtype;
      }
    }
    EXPECT_NE(found.values, exact);
  }
}

// Each token of these runs once: nothing is cached, nothing preempted.
std::vector<GenerateRequest> TracedRequests(const GoldenCase& golden) {
  std::vector<GenerateRequest> requests;
  for (const auto& sequence : golden.sequences) {
    GenerateRequest request;
    request.prompt = sequence.tokens;
    request.stop = {.max_tokens = 12, .ignore_eos = true};
    request.scheduling.prefix_cache = false;
    request.memory_trace = MemoryTraceParams{.prompt_tokens = 1000};
    if (requests.size() == 1) request.memory = {.knn = 3, .masked_rows = {1, 2, 3, 50, 51, 52, 53, 54, 55, 56, 57, 58}};
    if (requests.size() == 2) request.memory = {.enabled = false};
    requests.push_back(request);
  }
  return requests;
}

TEST(TableQueriesTest, CountsAreThoseOfTheTraces) {
  for (const char* name : {"A", "B", "D"}) {
    const GoldenCase golden = LoadGolden(name);
    for (int ranks : {1, 2}) {
      const std::unique_ptr<Engine> engine = Start(Options(golden, ranks));
      const std::vector<Generated> found = GenerateAll(*engine, TracedRequests(golden));
      for (const ValueTableInfo& table : engine->model().value_tables) {
        std::map<int32_t, uint32_t> expected;
        uint64_t reads = 0;
        for (const Generated& generated : found) {
          for (const TokenTrace& token : generated.memory_traces) {
            for (const LayerTrace& layer : token.layers) {
              if (std::find(table.layers.begin(), table.layers.end(), layer.layer) == table.layers.end()) continue;
              reads += layer.rows.size();
              for (int32_t row : layer.rows) ++expected[row];
            }
          }
        }
        ASSERT_GT(reads, 1000u);
        std::vector<int32_t> some;
        for (int32_t row = 0; row < table.rows && some.size() < 300; ++row) some.push_back(row);
        const RowStats stats = Count(*engine, {.layer = table.layers[0], .top = 7, .rows = some}).value();
        EXPECT_EQ(stats.table_rows, table.rows);
        EXPECT_EQ(stats.reads, reads) << name << " on " << ranks;
        EXPECT_EQ(stats.distinct_rows, static_cast<int64_t>(expected.size()));
        std::vector<std::pair<int32_t, uint32_t>> top(expected.begin(), expected.end());
        std::stable_sort(top.begin(), top.end(), [](const auto& a, const auto& b) { return a.second > b.second; });
        top.resize(7);
        EXPECT_EQ(stats.top, top) << name << " on " << ranks;
        for (int32_t row : some) EXPECT_EQ(stats.counts[row], expected.contains(row) ? expected[row] : 0) << row;
        EXPECT_GT(stats.since, absl::ZeroDuration());
      }
    }
  }
}

TEST(TableQueriesTest, AResetLosesNoRead) {
  const GoldenCase golden = LoadGolden("A");
  const std::unique_ptr<Engine> engine = Start(Options(golden));
  std::vector<GenerateRequest> requests;
  uint64_t tokens = 0;
  for (int i = 0; i < 30; ++i) {
    GenerateRequest request;
    request.prompt = golden.sequences[i % golden.sequences.size()].tokens;
    request.stop = {.max_tokens = 60, .ignore_eos = true};
    request.scheduling.prefix_cache = false;
    tokens += golden.sequences[i % golden.sequences.size()].tokens.size() + 59;
    requests.push_back(request);
  }
  std::vector<std::shared_ptr<testing::Collector>> collectors;
  for (const GenerateRequest& request : requests) {
    collectors.push_back(std::make_shared<testing::Collector>());
    engine->Generate(request, collectors.back());
  }
  uint64_t reads = 0;
  int resets = 0;
  while (engine->load().requests > 0) {
    reads += Count(*engine, {.reset = true})->reads;
    ++resets;
  }
  for (const auto& collector : collectors) ASSERT_TRUE(collector->Wait().finished.ok());
  reads += Count(*engine, {.reset = true})->reads;
  EXPECT_EQ(reads, tokens * 2 * engine->model().mem_heads * engine->model().mem_knn);
  EXPECT_GT(resets, 3);
  const RowStats after = Count(*engine, {}).value();
  EXPECT_EQ(after.reads, 0u);
  EXPECT_EQ(after.distinct_rows, 0);
  EXPECT_THAT(after.top, IsEmpty());
}

TEST(TableQueriesTest, WrongQuestionsNameFieldValueAndLimit) {
  const GoldenCase golden = LoadGolden("A");
  std::unique_ptr<Engine> engine = Start(Options(golden));
  const auto read = [&](const ReadRowsRequest& request) { return std::string(Read(*engine, request).status().message()); };
  const auto count = [&](const RowStatsRequest& request) { return std::string(Count(*engine, request).status().message()); };
  EXPECT_EQ(read({}), "rows: has 0 rows; 1 to 256 are accepted");
  EXPECT_EQ(read({.rows = std::vector<int32_t>(257, 1)}), "rows: has 257 rows; 1 to 256 are accepted");
  EXPECT_EQ(read({.rows = {0, 1024}}), "rows: row 1024 at index 1 is not in [0, 1024)");
  EXPECT_EQ(read({.rows = {-1}}), "rows: row -1 at index 0 is not in [0, 1024)");
  EXPECT_EQ(read({.layer = 2, .rows = {0}}), "layer: 2 has no memory; these do: 1, 4");
  EXPECT_EQ(count({.layer = -7}), "layer: -7 has no memory; these do: 1, 4");
  EXPECT_EQ(count({.top = -1}), "top: -1 is not in [0, 1000]");
  EXPECT_EQ(count({.top = 1001}), "top: 1001 is not in [0, 1000]");
  EXPECT_EQ(count({.rows = {1024}}), "rows: row 1024 at index 0 is not in [0, 1024)");
  EXPECT_EQ(count({.rows = std::vector<int32_t>(1025, 0)}), "rows: has 1025 rows; at most 1024 are accepted");

  EngineOptions options = Options(golden);
  options.count_rows = false;
  engine = Start(options);
  const absl::Status status = Count(*engine, {}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(std::string(status.message()), HasSubstr("--count_rows"));
  EXPECT_EQ(read({.rows = {5}}), "");

  engine = Start(Options(LoadGolden("E")));
  EXPECT_EQ(Read(*engine, {.rows = {0}}).status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_EQ(Count(*engine, {}).status().message(), "the model has no memory layers");
}

TEST(TableQueriesTest, TooManyQuestionsAtOnceAreRefusedAndAllAreAnswered) {
  const GoldenCase golden = LoadGolden("A");
  const std::unique_ptr<Engine> engine = Start(Options(golden));
  // Whoever generates keeps the engine at one question a step.
  auto running = std::make_shared<testing::Collector>();
  GenerateRequest request;
  request.prompt = std::vector<int32_t>(200, 7);
  request.stop = {.max_tokens = 50, .ignore_eos = true};
  engine->Generate(request, running);
  std::atomic<int> answered{0}, refused{0};
  constexpr int kQuestions = 5000;
  std::promise<void> all;
  for (int i = 0; i < kQuestions; ++i) {
    engine->ReadRows({.rows = {i % 1024}}, [&](absl::StatusOr<TableRows> rows) {
      if (!rows.ok()) {
        EXPECT_EQ(rows.status().code(), absl::StatusCode::kResourceExhausted) << rows.status();
        ++refused;
      }
      if (++answered == kQuestions) all.set_value();
    });
  }
  all.get_future().wait();
  EXPECT_GT(refused, 0);
  EXPECT_LT(refused, kQuestions);
  EXPECT_TRUE(running->Wait().finished.ok());
}

TEST(TableQueriesTest, QuestionsAreAnsweredWhenTheEngineStops) {
  const GoldenCase golden = LoadGolden("A");
  std::atomic<int> answered{0};
  {
    const std::unique_ptr<Engine> engine = Start(Options(golden));
    for (int i = 0; i < 20; ++i) engine->CountRows({}, [&](const absl::StatusOr<RowStats>&) { ++answered; });
  }
  EXPECT_EQ(answered, 20);
}

TEST(RowStatsScanTest, FindsTheTopRowsOfAllSlices) {
  std::mt19937 random(7);
  const int64_t rows = 2 * RowStatsScan::kSliceRows + 12345;
  std::vector<uint32_t> counts(rows);
  for (int64_t i = 0; i < rows; ++i) counts[i] = random() % 5 == 0 ? random() % 1000 : 0;
  counts[rows - 1] = UINT32_MAX;
  std::vector<std::pair<int32_t, uint32_t>> expected;
  uint64_t reads = 0;
  for (int64_t i = 0; i < rows; ++i) {
    reads += counts[i];
    if (counts[i] > 0) expected.emplace_back(static_cast<int32_t>(i), counts[i]);
  }
  const int64_t distinct = static_cast<int64_t>(expected.size());
  std::stable_sort(expected.begin(), expected.end(), [](const auto& a, const auto& b) { return a.second > b.second; });
  for (int32_t top : {0, 1, 2, 1000}) {
    const auto last = static_cast<int32_t>(rows - 1), middle = static_cast<int32_t>(RowStatsScan::kSliceRows);
    RowStatsScan scan({.top = top, .rows = {last, middle, 0, last}}, rows);
    int slices = 0;
    for (; scan.next_rows() > 0; ++slices) scan.Add(absl::MakeConstSpan(counts).subspan(scan.next_row(), scan.next_rows()));
    EXPECT_EQ(slices, 3);
    const RowStats stats = scan.Finish();
    EXPECT_EQ(stats.reads, reads);
    EXPECT_EQ(stats.distinct_rows, distinct);
    EXPECT_EQ(stats.top, (std::vector<std::pair<int32_t, uint32_t>>(expected.begin(), expected.begin() + top)));
    EXPECT_THAT(stats.counts, ElementsAre(UINT32_MAX, counts[middle], counts[0], UINT32_MAX));
  }
  EXPECT_EQ(expected[0], (std::pair<int32_t, uint32_t>(static_cast<int32_t>(rows - 1), UINT32_MAX)));
}

}  // namespace
}  // namespace memserve::engine
