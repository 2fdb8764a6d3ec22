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
  std::vector<std::vector<float>> chosen_logprobs = {};
  std::vector<engine::PromptDelta> prompt = {};
  int deltas = 0;

  bool operator==(const Generated& other) const {
    return text == other.text && token_ids == other.token_ids && logprobs == other.logprobs && finished.ok() == other.finished.ok();
  }
};

class Collector final : public engine::GenerateListener {
 public:
  void OnPrompt(engine::PromptDelta delta) override { At(0).prompt.push_back(std::move(delta)); }
  void OnDelta(engine::Delta delta) override {
    Generated& generated = At(delta.choice);
    ++generated.deltas;
    generated.text += delta.text;
    generated.token_ids.insert(generated.token_ids.end(), delta.token_ids.begin(), delta.token_ids.end());
    generated.logprobs.insert(generated.logprobs.end(), delta.logprobs.begin(), delta.logprobs.end());
    generated.top_logprobs.insert(generated.top_logprobs.end(), delta.top_logprobs.begin(), delta.top_logprobs.end());
    generated.chosen_logprobs.insert(generated.chosen_logprobs.end(), delta.chosen_logprobs.begin(), delta.chosen_logprobs.end());
    generated.memory_traces.insert(generated.memory_traces.end(), delta.memory_traces.begin(), delta.memory_traces.end());
    if (++deltas_ == 1) first_.set_value();
  }
  void OnFinished(absl::StatusOr<engine::Finished> finished) override {
    const bool last = !finished.ok() || finished->last;
    Generated& generated = At(finished.ok() ? finished->choice : 0);
    if (finished.ok()) generated.text += finished->text;
    generated.finished = std::move(finished);
    if (last) promise_.set_value(std::move(choices_));
  }
  // Blocks until the end.
  Generated Wait() { return std::move(WaitForAll().front()); }
  std::vector<Generated> WaitForAll() { return future_.get(); }
  void WaitForFirstDelta() { first_.get_future().wait(); }

 private:
  Generated& At(size_t choice) {
    if (choices_.size() <= choice) choices_.resize(choice + 1);
    return choices_[choice];
  }

  std::vector<Generated> choices_;
  int deltas_ = 0;
  std::promise<std::vector<Generated>> promise_;
  std::promise<void> first_;
  std::future<std::vector<Generated>> future_ = promise_.get_future();
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

inline std::vector<Generated> GenerateChoices(engine::Engine& engine, const engine::GenerateRequest& request) {
  const auto collector = std::make_shared<Collector>();
  engine.Generate(request, collector);
  return collector->WaitForAll();
}

inline absl::StatusOr<engine::ScoreResult> Score(engine::Engine& engine, const engine::ScoreRequest& request) {
  auto promise = std::make_shared<std::promise<absl::StatusOr<engine::ScoreResult>>>();
  std::future<absl::StatusOr<engine::ScoreResult>> future = promise->get_future();
  engine.Score(request, [promise](absl::StatusOr<engine::ScoreResult> result) { promise->set_value(std::move(result)); });
  return future.get();
}

}  // namespace memserve::testing
