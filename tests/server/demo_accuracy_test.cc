// The demo checkpoint knows its facts through the endpoint, and its value table is what knows them.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "engine/engine.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/server/harness.h"

namespace memserve::server {
namespace {

constexpr int kStreams = 16;
constexpr double kLeastAccuracy = 0.85;
constexpr double kMostWithoutMemory = 0.25;

struct Question {
  std::string prompt;
  std::vector<std::string> answers;
  std::string relation;
};

std::vector<Question> ReadQuestions(const std::string& file) {
  std::vector<Question> questions;
  std::ifstream lines(file);
  for (std::string line; std::getline(lines, line);) {
    const nlohmann::json json = nlohmann::json::parse(line);
    questions.push_back({json.at("prompt"), json.at("answers").get<std::vector<std::string>>(), json.at("relation")});
  }
  return questions;
}

class DemoAccuracyTest : public ::testing::Test {
 protected:
  void SetUp() override {
    engine::EngineOptions options;
    options.checkpoint = MEMSERVE_DEMO_DIR "/checkpoint";
    auto engine = engine::Engine::Create(options);
    ASSERT_TRUE(engine.ok()) << engine.status();
    auto server = Server::Listen(OnAnyPort());
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    ASSERT_TRUE(server_->Serve(*std::move(engine)).ok());
    questions_ = ReadQuestions(MEMSERVE_DEMO_DIR "/questions/heldout.jsonl");
    ASSERT_GT(questions_.size(), 500u);
  }

  // Asks all, in order over concurrent streams; the share that is right, exactly, after stripping.
  double Accuracy(bool memory) {
    std::vector<char> right(questions_.size(), 0);
    std::atomic<size_t> next = 0;
    std::vector<std::thread> streams;
    for (int i = 0; i < kStreams; ++i) {
      streams.emplace_back([&] {
        const auto stub = v1::Inference::NewStub(Connect(server_->port()));
        for (size_t q = next++; q < questions_.size(); q = next++) {
          v1::GenerateRequest request = Ask(questions_[q].prompt);
          request.mutable_sampling()->set_temperature(0);
          request.mutable_stop()->set_max_tokens(32);
          request.mutable_stop()->add_strings("\n");
          request.mutable_memory()->set_enabled(memory);
          const Heard heard = Generate(*stub, request);
          EXPECT_TRUE(heard.status.ok()) << heard.status.error_message();
          const std::string answer(absl::StripAsciiWhitespace(heard.text()));
          const std::vector<std::string>& answers = questions_[q].answers;
          right[q] = std::find(answers.begin(), answers.end(), answer) != answers.end() ? 1 : 0;
        }
      });
    }
    for (std::thread& stream : streams) stream.join();

    std::map<std::string, std::pair<int, int>> by_relation;  // right, asked
    int sum = 0;
    for (size_t q = 0; q < questions_.size(); ++q) {
      by_relation[questions_[q].relation].first += right[q];
      by_relation[questions_[q].relation].second += 1;
      sum += right[q];
    }
    std::printf("memory %s:\n", memory ? "on" : "off");
    for (const auto& [relation, count] : by_relation) {
      std::printf("  %-16s %4d of %4d  %5.1f %%\n", relation.c_str(), count.first, count.second,
                  100.0 * count.first / count.second);
    }
    const double accuracy = static_cast<double>(sum) / static_cast<double>(questions_.size());
    std::printf("  %-16s %4d of %4zu  %5.1f %%\n", "all", sum, questions_.size(), 100 * accuracy);
    return accuracy;
  }

  std::unique_ptr<Server> server_;
  std::vector<Question> questions_;
};

TEST_F(DemoAccuracyTest, HeldOutQuestionsAreAnsweredRightByTheMemoryAndNotWithoutIt) {
  EXPECT_GE(Accuracy(true), kLeastAccuracy);
  EXPECT_LE(Accuracy(false), kMostWithoutMemory);
}

}  // namespace
}  // namespace memserve::server
