// Many streams at once over one connection, on gRPC's own threads, each timed by the monotonic clock as its messages arrive.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_set>
#include <vector>

#include "clients/options.h"
#include "grpcpp/support/status.h"
#include "memserve/v1/inference.grpc.pb.h"

namespace memserve::clients {

using LoadClock = std::chrono::steady_clock;

// What was seen of one stream.
struct StreamTimes {
  struct Message {
    LoadClock::time_point at;
    int tokens = 0;
  };
  LoadClock::time_point begin, end;
  std::vector<Message> messages;  // that brought tokens
  grpc::Status status;
  std::optional<double> retry_after_ms;  // of a refusal
  std::optional<v1::Finished> finished;

  int tokens() const {
    int sum = 0;
    for (const Message& message : messages) sum += message.tokens;
    return sum;
  }
};

class LoadStreams {
 public:
  explicit LoadStreams(const Options& options);
  ~LoadStreams();  // cancels what runs
  LoadStreams(const LoadStreams&) = delete;
  LoadStreams& operator=(const LoadStreams&) = delete;

  // `on_done` is called once, on a thread of gRPC's; it may start another stream. `on_tokens`, if given, after each message with
  // tokens.
  using OnDone = std::function<void(const StreamTimes&)>;
  using OnTokens = std::function<void(const StreamTimes&)>;
  void Start(const v1::GenerateRequest& request, OnDone on_done, OnTokens on_tokens = nullptr);

  int running() const;
  void CancelAll();
  void WaitUntilNoneRun();

 private:
  class Stream;

  void Done(Stream* stream);

  const std::optional<double> timeout_seconds_;
  const std::unique_ptr<v1::Inference::Stub> stub_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::unordered_set<Stream*> running_;
};

}  // namespace memserve::clients
