// An engine without a model: the test speaks for it. Validates as the real one does; all else happens when the test says so.
#pragma once

#include <algorithm>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "engine/engine.h"
#include "engine/validate.h"
#include "gtest/gtest.h"
#include "spdlog/spdlog.h"

namespace memserve::server {

// Far longer than anything here takes; a test that waits for so long has failed.
inline constexpr absl::Duration kPatience = absl::Seconds(20);

class FakeEngine final : public engine::Engine {
 public:
  struct Generation {
    engine::GenerateRequest request;
    std::shared_ptr<engine::GenerateListener> listener;
  };
  struct Scoring {
    engine::ScoreRequest request;
    engine::ScoreCallback callback;
  };

  FakeEngine() {
    spdlog::set_level(spdlog::level::warn);
    model_info = {.name = "fake",
                  .architecture = "memory_llama",
                  .vocab_size = 300,
                  .max_context_tokens = 128,
                  .dim = 8,
                  .n_layers = 6,
                  .n_heads = 4,
                  .n_kv_heads = 2,
                  .trunk_parameters = 5'000'000'000,
                  .value_tables = {{.name = "layers.1.feed_forward.values.weight",
                                    .layers = {1, 4},
                                    .rows = 1 << 20,
                                    .dim = 1024,
                                    .format = "bf16",
                                    .placement = "host",
                                    .bytes = int64_t{1} << 31}},
                  .memory_layers = {1, 4},
                  .memory_rows = 1 << 20,
                  .mem_heads = 4,
                  .mem_knn = 32,
                  .eos_token_ids = {257},
                  .bos_token_id = 256,
                  .tokenizer = "bytes",
                  .backend = "fake",
                  .isa = "none",
                  .weight_dtype = "f32",
                  .activation_dtype = "f32",
                  .kv_dtype = "f32",
                  .devices = 2};
  }

  // --- what the test says and asks

  engine::ModelInfo model_info;
  engine::Load load_now;
  // Runs on gRPC's thread within Generate; without it the test takes generations one by one.
  std::function<void(Generation)> on_generate;
  bool ends_what_is_cancelled = true;  // false: the test calls OnFinished itself, late

  bool refuses_late = false;  // a refusal is spoken by SpeakRefusals alone

  // The next request that arrived and is valid.
  Generation NextGeneration() { return Next(generations_); }
  Scoring NextScoring() { return Next(scorings_); }

  // Waits until an id was cancelled.
  bool WaitForCancel(const std::string& id) {
    const absl::MutexLock lock(&mutex_);
    const auto cancelled = [this, &id]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      return std::find(cancelled_.begin(), cancelled_.end(), id) != cancelled_.end();
    };
    return mutex_.AwaitWithTimeout(absl::Condition(&cancelled), kPatience);
  }
  std::vector<std::string> cancelled() const {
    const absl::MutexLock lock(&mutex_);
    return cancelled_;
  }
  bool WaitForDrain() {
    const absl::MutexLock lock(&mutex_);
    return mutex_.AwaitWithTimeout(absl::Condition(&draining_), kPatience);
  }
  bool WaitForRefusals(size_t count) {
    const absl::MutexLock lock(&mutex_);
    const auto arrived = [this, count]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return refusals_.size() >= count; };
    return mutex_.AwaitWithTimeout(absl::Condition(&arrived), kPatience);
  }
  void SpeakRefusals() {
    std::vector<std::pair<std::shared_ptr<engine::GenerateListener>, absl::Status>> refusals;
    {
      const absl::MutexLock lock(&mutex_);
      refusals.swap(refusals_);
    }
    for (const auto& [listener, status] : refusals) listener->OnFinished(status);
  }
  void Fail(absl::Status status) {
    const absl::MutexLock lock(&mutex_);
    status_ = std::move(status);
  }
  // The end of a generation, after which its id is free.
  void End(const Generation& generation, absl::StatusOr<engine::Finished> finished) {
    Forget(generation.request.id);
    generation.listener->OnFinished(std::move(finished));
  }

  // --- engine::Engine

  std::string Generate(engine::GenerateRequest request, std::shared_ptr<engine::GenerateListener> listener) override {
    absl::Status status = Validate(request, limits());
    if (const auto* ids = std::get_if<std::vector<int32_t>>(&request.prompt); status.ok() && ids != nullptr) {
      status = engine::ValidatePromptLength(static_cast<int64_t>(ids->size()), model_info.max_context_tokens);
    }
    if (status.ok()) {
      const absl::MutexLock lock(&mutex_);
      if (draining_) status = absl::UnavailableError("the engine is draining");
      if (status.ok() && !running_.emplace(request.id, listener).second) {
        status = absl::AlreadyExistsError("request_id: '" + request.id + "' is running");
      }
    }
    if (!status.ok()) {
      if (!refuses_late) {
        listener->OnFinished(status);
        return "";
      }
      const absl::MutexLock lock(&mutex_);
      refusals_.emplace_back(std::move(listener), status);
      return "";
    }
    const std::string id = request.id;
    if (on_generate) {
      on_generate({std::move(request), std::move(listener)});
    } else {
      const absl::MutexLock lock(&mutex_);
      generations_.push_back({std::move(request), std::move(listener)});
    }
    return id;
  }

  std::string Score(engine::ScoreRequest request, engine::ScoreCallback callback) override {
    if (const absl::Status status = Validate(request, limits()); !status.ok()) {
      callback(status);
      return "";
    }
    const std::string id = request.id;
    const absl::MutexLock lock(&mutex_);
    scorings_.push_back({std::move(request), std::move(callback)});
    return id;
  }

  bool Cancel(const std::string& id) override {
    std::shared_ptr<engine::GenerateListener> listener;
    {
      const absl::MutexLock lock(&mutex_);
      cancelled_.push_back(id);
      const auto found = running_.find(id);
      if (found == running_.end()) return false;
      if (!ends_what_is_cancelled) return true;
      listener = found->second;
      running_.erase(found);
    }
    listener->OnFinished(absl::CancelledError("cancelled"));
    return true;
  }

  void Tokenize(std::string text, bool add_bos, bool allow_special,
                std::function<void(absl::StatusOr<std::vector<int32_t>>)> callback) override {
    std::vector<int32_t> ids(text.begin(), text.end());
    if (add_bos) ids.insert(ids.begin(), *model_info.bos_token_id);
    if (allow_special) ids.push_back(*model_info.bos_token_id);
    callback(ids);
  }
  void Detokenize(std::vector<int32_t> token_ids, bool keep_special,
                  std::function<void(absl::StatusOr<std::string>)> callback) override {
    std::string text;
    for (const int32_t id : token_ids) {
      if (id >= model_info.vocab_size) return callback(absl::InvalidArgumentError("token_ids: id 300 is not in [0, 300)"));
      if (id < 256) text += static_cast<char>(id);
      if (id >= 256 && keep_special) text += "<special>";
    }
    callback(text);
  }

  // Column c of row r is 10 · r + c.
  void ReadRows(engine::ReadRowsRequest request, std::function<void(absl::StatusOr<engine::TableRows>)> callback) override {
    if (request.rows.empty()) return callback(absl::InvalidArgumentError("rows: has 0 rows; 1 to 256 are accepted"));
    engine::TableRows rows{.dim = 2};
    for (const int32_t row : request.rows)
      rows.values.insert(rows.values.end(), {10.0f * static_cast<float>(row), 10.0f * static_cast<float>(row) + 1});
    callback(rows);
  }
  // What was asked is told back: the table's layer as reads, the reset as distinct rows, each row's own number as its count.
  void CountRows(engine::RowStatsRequest request, std::function<void(absl::StatusOr<engine::RowStats>)> callback) override {
    if (request.top > 1000) return callback(absl::InvalidArgumentError("top: is not in [0, 1000]"));
    engine::RowStats stats{
        .table_rows = 1 << 20, .reads = static_cast<uint64_t>(request.layer.value_or(0)), .distinct_rows = request.reset ? 1 : 0};
    for (int32_t i = 0; i < request.top; ++i) stats.top.emplace_back(i, 100 - i);
    for (const int32_t row : request.rows) stats.counts.push_back(static_cast<uint32_t>(row));
    stats.since = absl::Seconds(3);
    callback(stats);
  }

  const engine::ModelInfo& model() const override { return model_info; }
  engine::Load load() const override { return load_now; }
  absl::Status status() const override {
    const absl::MutexLock lock(&mutex_);
    return status_;
  }

  void Drain(absl::Duration limit) override {
    std::map<std::string, std::shared_ptr<engine::GenerateListener>> rest;
    {
      const absl::MutexLock lock(&mutex_);
      draining_ = true;
      drain_until_ = std::min(drain_until_, absl::Now() + limit);
      changed_.SignalAll();
      while (!running_.empty() && absl::Now() < drain_until_) changed_.WaitWithDeadline(&mutex_, drain_until_);
      rest.swap(running_);
    }
    for (const auto& [id, listener] : rest) listener->OnFinished(absl::UnavailableError("the engine is draining"));
  }

 private:
  engine::RequestLimits limits() const {
    return {.vocab_size = model_info.vocab_size,
            .max_context_tokens = model_info.max_context_tokens,
            .max_prompt_bytes = 1000,
            .has_tokenizer = true,
            .chat_template = model_info.chat ? absl::OkStatus() : absl::UnimplementedError("chat: there is no template"),
            .memory = {.layers = model_info.memory_layers, .mem_knn = model_info.mem_knn}};
  }

  void Forget(const std::string& id) {
    const absl::MutexLock lock(&mutex_);
    running_.erase(id);
    changed_.SignalAll();
  }

  template <typename Request>
  Request Next(std::deque<Request>& queue) {
    const absl::MutexLock lock(&mutex_);
    const auto arrived = [&queue] { return !queue.empty(); };
    if (!mutex_.AwaitWithTimeout(absl::Condition(&arrived), kPatience)) {
      ADD_FAILURE() << "no request arrived";
      return {};
    }
    Request request = std::move(queue.front());
    queue.pop_front();
    return request;
  }

  mutable absl::Mutex mutex_;
  absl::CondVar changed_;
  std::deque<Generation> generations_ ABSL_GUARDED_BY(mutex_);
  std::deque<Scoring> scorings_ ABSL_GUARDED_BY(mutex_);
  std::map<std::string, std::shared_ptr<engine::GenerateListener>> running_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::pair<std::shared_ptr<engine::GenerateListener>, absl::Status>> refusals_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::string> cancelled_ ABSL_GUARDED_BY(mutex_);
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Time drain_until_ ABSL_GUARDED_BY(mutex_) = absl::InfiniteFuture();
};

}  // namespace memserve::server
