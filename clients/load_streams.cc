#include "clients/load_streams.h"

#include <utility>

#include "clients/call.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "grpcpp/client_context.h"
#include "grpcpp/support/client_callback.h"

namespace memserve::clients {
namespace {

std::optional<double> RetryAfterMs(const grpc::Status& status) {
  google::rpc::Status details;
  if (!details.ParseFromString(status.error_details())) return std::nullopt;
  google::rpc::RetryInfo retry;
  for (const auto& detail : details.details()) {
    if (detail.UnpackTo(&retry))
      return 1e3 * static_cast<double>(retry.retry_delay().seconds()) + 1e-6 * retry.retry_delay().nanos();
  }
  return std::nullopt;
}

}  // namespace

// Deletes itself once it is done.
class LoadStreams::Stream final : public grpc::ClientReadReactor<v1::GenerateResponse> {
 public:
  Stream(LoadStreams& streams, const v1::GenerateRequest& request, LoadStreams::OnDone on_done, OnTokens on_tokens)
      : streams_(streams), request_(request), on_done_(std::move(on_done)), on_tokens_(std::move(on_tokens)) {
    times_.messages.reserve(64);
  }

  void Start() {
    if (streams_.timeout_seconds_) {
      context_.set_deadline(std::chrono::system_clock::now() +
                            std::chrono::microseconds(static_cast<int64_t>(*streams_.timeout_seconds_ * 1e6)));
    }
    times_.begin = LoadClock::now();
    streams_.stub_->async()->Generate(&context_, &request_, this);
    StartRead(&message_);
    StartCall();
  }
  void Cancel() { context_.TryCancel(); }

  void OnReadDone(bool ok) override {
    if (!ok) return;
    const int tokens = message_.delta().token_ids_size();
    if (tokens > 0) times_.messages.push_back({LoadClock::now(), tokens});
    if (message_.has_finished()) times_.finished = message_.finished();
    if (tokens > 0 && on_tokens_) on_tokens_(times_);
    StartRead(&message_);
  }

  void OnDone(const grpc::Status& status) override {
    times_.end = LoadClock::now();
    times_.status = status;
    if (!status.ok()) times_.retry_after_ms = RetryAfterMs(status);
    on_done_(times_);
    streams_.Done(this);
  }

 private:
  LoadStreams& streams_;
  const v1::GenerateRequest request_;
  const LoadStreams::OnDone on_done_;
  const OnTokens on_tokens_;
  grpc::ClientContext context_;
  v1::GenerateResponse message_;
  StreamTimes times_;
};

LoadStreams::LoadStreams(const Options& options) : timeout_seconds_(options.timeout_seconds), stub_(ConnectInference(options)) {}

LoadStreams::~LoadStreams() {
  CancelAll();
  WaitUntilNoneRun();
}

void LoadStreams::Start(const v1::GenerateRequest& request, OnDone on_done, OnTokens on_tokens) {
  auto* const stream = new Stream(*this, request, std::move(on_done), std::move(on_tokens));
  {
    const std::lock_guard lock(mutex_);
    running_.insert(stream);
  }
  stream->Start();
}

int LoadStreams::running() const {
  const std::lock_guard lock(mutex_);
  return static_cast<int>(running_.size());
}

void LoadStreams::CancelAll() {
  const std::lock_guard lock(mutex_);
  for (Stream* const stream : running_) stream->Cancel();
}

void LoadStreams::WaitUntilNoneRun() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return running_.empty(); });
}

void LoadStreams::Done(Stream* stream) {
  const std::lock_guard lock(mutex_);
  running_.erase(stream);
  delete stream;
  if (running_.empty()) changed_.notify_all();
}

}  // namespace memserve::clients
