// Listeners that keep what they hear, for tests.
#pragma once

#include <future>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/engine.h"

namespace memserve::testing {

// All of one generation.
struct Generated {
  absl::StatusOr<engine::Finished> finished = absl::UnknownError("not finished");
  std::string text;  // of the deltas and the end
  std::vector<int32_t> token_ids;
  std::vector<float> logprobs;
  std::vector<std::vector<engine::TokenLogprob>> top_logprobs = {};
  std::vector<engine::TokenTrace> memory_traces = {};
  int deltas = 0;

  bool operator==(const Generated& other) const {
    return text == other.text && token_ids == other.token_ids && logprobs == other.logprobs && finished.ok() == other.finished.ok();
  }
};

class Collector final : public engine::GenerateListener {
 public:
  void OnDelta(engine::Delta delta) override {
    ++generated_.deltas;
    generated_.text += delta.text;
    generated_.token_ids.insert(generated_.token_ids.end(), delta.token_ids.begin(), delta.token_ids.end());
    generated_.logprobs.insert(generated_.logprobs.end(), delta.logprobs.begin(), delta.logprobs.end());
    generated_.top_logprobs.insert(generated_.top_logprobs.end(), delta.top_logprobs.begin(), delta.top_logprobs.end());
    generated_.memory_traces.insert(generated_.memory_traces.end(), delta.memory_traces.begin(), delta.memory_traces.end());
    if (generated_.deltas == 1) first_.set_value();
  }
  void OnFinished(absl::StatusOr<engine::Finished> finished) override {
    if (finished.ok()) generated_.text += finished->text;
    generated_.finished = std::move(finished);
    promise_.set_value(std::move(generated_));
  }
  // Blocks until the end.
  Generated Wait() { return future_.get(); }
  void WaitForFirstDelta() { first_.get_future().wait(); }

 private:
  Generated generated_;
  std::promise<Generated> promise_;
  std::promise<void> first_;
  std::future<Generated> future_ = promise_.get_future();
};

// Submits all at once and waits for all.
inline std::vector<Generated> GenerateAll(engine::Engine& engine, const std::vector<engine::GenerateRequest>& requests) {
  std::vector<std::shared_ptr<Collector>> collectors;
  for (const engine::GenerateRequest& request : requests) {
    collectors.push_back(std::make_shared<Collector>());
    engine.Generate(request, collectors.back());
  }
  std::vector<Generated> all;
  for (const std::shared_ptr<Collector>& collector : collectors) all.push_back(collector->Wait());
  return all;
}

inline Generated Generate(engine::Engine& engine, const engine::GenerateRequest& request) {
  return GenerateAll(engine, {request}).front();
}

inline absl::StatusOr<engine::ScoreResult> Score(engine::Engine& engine, const engine::ScoreRequest& request) {
  auto promise = std::make_shared<std::promise<absl::StatusOr<engine::ScoreResult>>>();
  std::future<absl::StatusOr<engine::ScoreResult>> future = promise->get_future();
  engine.Score(request, [promise](absl::StatusOr<engine::ScoreResult> result) { promise->set_value(std::move(result)); });
  return future.get();
}

}  // namespace memserve::testing
