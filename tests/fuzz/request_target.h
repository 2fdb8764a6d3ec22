// Requests from outside as bytes, through the whole way: parsed, translated, run by an engine on golden case A until they end. What
// is wrong is told as one line. tests/server/request_fuzz_test.cc feeds it mutations.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <future>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "engine/engine.h"
#include "memserve/v1/inference.pb.h"
#include "server/convert.h"
#include "tests/support/collector.h"
#include "tests/support/golden.h"

namespace memserve::fuzz {

// What ended a request, and whether it heard more than it should have.
class Ending {
 public:
  // Any thread.
  void End(const absl::Status& status) {
    if (++ends_ == 1) promise_.set_value(status);
  }
  void HearMore() { heard_after_end_ = heard_after_end_ || ends_ > 0; }

  // False: it has not ended within the time.
  bool Wait(std::chrono::seconds limit) {
    if (future_.wait_for(limit) != std::future_status::ready) return false;
    status_ = future_.get();
    return true;
  }
  const absl::Status& status() const { return status_; }
  bool ended_once() const { return ends_ == 1 && !heard_after_end_; }

 private:
  std::atomic<int> ends_ = 0;
  std::atomic<bool> heard_after_end_ = false;
  std::promise<absl::Status> promise_;
  std::future<absl::Status> future_ = promise_.get_future();
  absl::Status status_;
};

class EndingListener final : public engine::GenerateListener {
 public:
  explicit EndingListener(std::shared_ptr<Ending> ending) : ending_(std::move(ending)) {}
  void OnPrompt(engine::PromptDelta delta) override {
    ending_->HearMore();
    server::ToProto(std::move(delta)).SerializeAsString();
  }
  void OnDelta(engine::Delta delta) override {
    ending_->HearMore();
    v1::Delta joined;
    server::Join(std::move(delta), joined);
    joined.SerializeAsString();
  }
  void OnFinished(absl::StatusOr<engine::Finished> finished) override {
    ending_->HearMore();
    const bool last = !finished.ok() || finished->last;
    const absl::Status status = finished.status();
    if (finished.ok()) server::ToProto(*std::move(finished), "id").SerializeAsString();
    if (last) ending_->End(status);
  }

 private:
  const std::shared_ptr<Ending> ending_;
};

class RequestTarget {
 public:
  static engine::EngineOptions Options() {
    engine::EngineOptions options = testing::ParityOptions(std::string(MEMSERVE_GOLDEN_DIR) + "/A/checkpoint");
    options.kv_cache_bytes = 1 << 20;  // few enough pages that sequences are preempted
    options.max_batch_tokens = 128;
    options.max_sequences = 8;
    options.max_waiting = 16;
    options.grammar_timeout_ms = 100;
    options.grammar_memory_bytes = 256 << 20;
    return options;
  }

  explicit RequestTarget(const engine::EngineOptions& options = Options())
      : engine_(engine::Engine::Create(options).value()), usual_(testing::Generate(*engine_, Usual())) {}

  // Starts what the bytes ask for: nothing if they are no request. `capped`: of few tokens and choices; else with a deadline.
  void Generate(const std::string& bytes, bool capped) {
    v1::GenerateRequest message;
    if (!message.ParseFromString(bytes)) return;
    if (capped) {
      v1::StopParams& stop = *message.mutable_stop();
      stop.set_max_tokens(stop.has_max_tokens() ? std::min(stop.max_tokens(), 16) : 16);
      if (message.has_n()) message.set_n(std::min(message.n(), 4));
      if (message.has_best_of()) message.set_best_of(std::min(message.best_of(), 4));
    }
    auto ending = Began(bytes);
    absl::StatusOr<engine::GenerateRequest> request = server::ToEngine(message, engine_->model(), Deadline(capped));
    if (!request.ok()) return ending->End(request.status());
    engine_->Generate(*std::move(request), std::make_shared<EndingListener>(ending));
  }

  void Score(const std::string& bytes) {
    v1::ScoreRequest message;
    if (!message.ParseFromString(bytes)) return;
    auto ending = Began(bytes);
    absl::StatusOr<engine::ScoreRequest> request = server::ToEngine(message, engine_->model(), Deadline(/*capped=*/false));
    if (!request.ok()) return ending->End(request.status());
    engine_->Score(*std::move(request), [ending](absl::StatusOr<engine::ScoreResult> result) {
      if (result.ok()) server::ToProto(*result, "id").SerializeAsString();
      ending->End(result.status());
    });
  }

  // Waits for all that has begun. Empty, or what is wrong.
  std::string Settle() {
    std::string wrong;
    for (const Request& request : begun_) {
      if (!request.ending->Wait(std::chrono::seconds(60))) return absl::StrCat("no end within a minute: ", Shown(request.bytes));
      const absl::Status& status = request.ending->status();
      ++counts_[std::min(static_cast<int>(status.raw_code()), kCodes - 1)];
      if (!IsExpected(status)) absl::StrAppend(&wrong, status.ToString(), ": ", Shown(request.bytes), "\n");
    }
    for (const Request& request : begun_) {
      if (!request.ending->ended_once()) absl::StrAppend(&wrong, "heard more after its end: ", Shown(request.bytes), "\n");
    }
    begun_.clear();
    return wrong;
  }

  // After all that: nothing is left, and an ordinary request has its usual answer.
  std::string CheckEngine() {
    std::string wrong;
    const testing::Generated generated = testing::Generate(*engine_, Usual());
    if (!generated.finished.ok() || !(generated == usual_))
      absl::StrAppend(&wrong, "a plain request answers '", generated.text, "' and not '", usual_.text, "'\n");
    for (int i = 0; i < 1000 && (engine_->load().kv_pages_used > 0 || engine_->load().requests > 0); ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    const engine::Load load = engine_->load();
    if (load.kv_pages_used != 0 || load.requests != 0) {
      absl::StrAppend(&wrong, load.kv_pages_used, " pages are held by ", load.requests, " requests\n");
    }
    if (!engine_->status().ok()) absl::StrAppend(&wrong, engine_->status().ToString());
    return wrong;
  }

  int ended_with(absl::StatusCode code) const { return counts_[static_cast<int>(code)]; }

 private:
  struct Request {
    std::string bytes;
    std::shared_ptr<Ending> ending;
  };
  static constexpr int kCodes = 20;

  static engine::GenerateRequest Usual() {
    engine::GenerateRequest request;
    request.prompt = "The keeper of the ";
    request.sampling = {.temperature = 1.0f, .seed = 7};
    request.stop = {.max_tokens = 12, .ignore_eos = true};
    request.logprobs = true;
    return request;
  }

  static absl::Time Deadline(bool capped) { return capped ? absl::InfiniteFuture() : absl::Now() + absl::Milliseconds(200); }

  // One line, with a code that says that the client is to blame, or the load.
  static bool IsExpected(const absl::Status& status) {
    switch (status.code()) {
      case absl::StatusCode::kOk:
        return true;
      case absl::StatusCode::kInvalidArgument:
      case absl::StatusCode::kResourceExhausted:
      case absl::StatusCode::kDeadlineExceeded:
      case absl::StatusCode::kUnimplemented:
      case absl::StatusCode::kNotFound:
      case absl::StatusCode::kAlreadyExists:
        return !status.message().empty() && server::ToGrpc(status).error_code() == static_cast<grpc::StatusCode>(status.raw_code());
      default:
        return false;
    }
  }

  static std::string Shown(const std::string& bytes) {
    v1::GenerateRequest message;
    std::string shown = message.ParseFromString(bytes) ? message.ShortDebugString() : "a ScoreRequest";
    if (shown.size() > 2000) shown.resize(2000);
    return shown;
  }

  std::shared_ptr<Ending> Began(const std::string& bytes) {
    begun_.push_back({.bytes = bytes, .ending = std::make_shared<Ending>()});
    return begun_.back().ending;
  }

  std::vector<Request> begun_;
  int counts_[kCodes] = {};
  const std::unique_ptr<engine::Engine> engine_;
  const testing::Generated usual_;
};

}  // namespace memserve::fuzz
