#include "server/generate_reactor.h"

#include <cstdint>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/convert.h"

namespace memserve::server {
namespace {

// A message that waits grows to this before the next one is begun: far below the 4 MiB that clients accept by default.
constexpr size_t kMaxJoinedBytes = 256 << 10;

size_t SizeOf(const engine::Delta& delta) {
  size_t bytes = delta.text.size() + sizeof(int32_t) * delta.token_ids.size() + sizeof(float) * delta.logprobs.size();
  for (const std::string& token : delta.token_bytes) bytes += sizeof(std::string) + token.size();
  for (const auto& chosen : delta.chosen_logprobs) bytes += chosen.size() * sizeof(float);
  for (const auto& top : delta.top_logprobs) bytes += sizeof(top) + top.size() * sizeof(top[0]);
  for (const engine::TokenTrace& trace : delta.memory_traces) {
    for (const engine::LayerTrace& layer : trace.layers) bytes += sizeof(layer) + 3 * sizeof(int32_t) * layer.rows.size();
  }
  return bytes;
}

}  // namespace

GenerateReactor* GenerateReactor::Start(Gate::Pass engine, engine::GenerateRequest request, size_t max_unread_bytes) {
  std::shared_ptr<GenerateReactor> reactor(new GenerateReactor(std::move(engine), request.id, max_unread_bytes));
  reactor->self_ = reactor;
  const bool taken = !reactor->engine_->Generate(std::move(request), reactor).empty();
  {
    const absl::MutexLock lock(&reactor->mutex_);
    reactor->taken_ |= taken;
  }
  // gRPC binds the reactor after this returns, and keeps what was started until then: it cannot be done yet.
  return reactor.get();
}

GenerateReactor::GenerateReactor(Gate::Pass engine, std::string id, size_t max_unread_bytes)
    : engine_(std::move(engine)), id_(std::move(id)), max_unread_bytes_(max_unread_bytes) {}

void GenerateReactor::OnDelta(engine::Delta delta) {
  bool too_slow = false;
  {
    const absl::MutexLock lock(&mutex_);
    taken_ = true;
    if (given_up_) return;
    Append(std::move(delta));
    too_slow = in_flight_ && unread_bytes_ > max_unread_bytes_;
  }
  Heard(too_slow);
}

void GenerateReactor::OnPrompt(engine::PromptDelta delta) {
  bool too_slow = false;
  {
    const absl::MutexLock lock(&mutex_);
    taken_ = true;
    if (given_up_) return;
    unread_.emplace_back();
    *unread_.back().message.mutable_prompt() = ToProto(std::move(delta));
    unread_.back().bytes = unread_.back().message.ByteSizeLong();
    unread_bytes_ += unread_.back().bytes;
    too_slow = in_flight_ && unread_bytes_ > max_unread_bytes_;
  }
  Heard(too_slow);
}

void GenerateReactor::Heard(bool too_slow) {
  if (too_slow) {
    GiveUp(grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED,
                        absl::StrCat("this stream's reader is too slow: more than ", max_unread_bytes_, " bytes are unread")));
  } else {
    Proceed();
  }
}

void GenerateReactor::OnFinished(absl::StatusOr<engine::Finished> finished) {
  {
    const absl::MutexLock lock(&mutex_);
    if (!finished.ok() || finished->last) end_ = given_up_status_.value_or(ToGrpc(finished.status()));
    if (finished.ok() && !given_up_) {
      unread_.emplace_back();
      *unread_.back().message.mutable_finished() = ToProto(*std::move(finished), id_);
    }
  }
  Proceed();
}

void GenerateReactor::Append(engine::Delta delta) {
  const size_t bytes = SizeOf(delta);
  const bool joins = !unread_.empty() && unread_.back().bytes + bytes <= kMaxJoinedBytes &&
                     !unread_.back().message.has_finished() && !unread_.back().message.has_prompt() &&
                     (!unread_.back().message.has_delta() || unread_.back().message.delta().choice() == delta.choice);
  if (!joins) unread_.emplace_back();
  Join(std::move(delta), *unread_.back().message.mutable_delta());
  unread_.back().bytes += bytes;
  unread_bytes_ += bytes;
}

void GenerateReactor::Proceed() {
  bool write = false;
  std::optional<grpc::Status> end;
  {
    const absl::MutexLock lock(&mutex_);
    if (in_flight_) return;
    write = !unread_.empty();
    if (write) {
      message_ = std::move(unread_.front().message);
      unread_bytes_ -= unread_.front().bytes;
      unread_.pop_front();
    }
    if (unread_.empty()) end = end_;
    if (!write && !end.has_value()) return;
    in_flight_ = true;
  }
  // The end leaves with the last message: one packet. After it nothing here may be touched.
  if (write && end.has_value()) {
    StartWriteAndFinish(&message_, grpc::WriteOptions(), *std::move(end));
  } else if (write) {
    StartWrite(&message_);
  } else {
    Finish(*std::move(end));
  }
}

void GenerateReactor::OnWriteDone(bool ok) {
  {
    const absl::MutexLock lock(&mutex_);
    in_flight_ = false;
  }
  if (!ok) GiveUp(std::nullopt);
  Proceed();
}

void GenerateReactor::GiveUp(std::optional<grpc::Status> status) {
  bool engine_runs = false;
  {
    const absl::MutexLock lock(&mutex_);
    if (given_up_) return;
    given_up_ = true;
    given_up_status_ = std::move(status);
    unread_.clear();
    unread_bytes_ = 0;
    engine_runs = taken_ && !end_.has_value();
  }
  // Not one that was refused or has ended: the id may be another request's.
  if (engine_runs) engine_->Cancel(id_);
}

void GenerateReactor::OnCancel() { GiveUp(std::nullopt); }

void GenerateReactor::OnDone() {
  engine_.reset();
  const std::shared_ptr<GenerateReactor> last_share = std::move(self_);
}

}  // namespace memserve::server
