// One streaming call: writes what the engine says in order, one write in flight, and hears the client leave.
//
// gRPC owns it until OnDone and the engine until it drops its listener, whichever is later. gRPC's threads and the engine's meet
// here; nothing blocks, and the engine and gRPC are called without the lock, because both may call back at once.
#pragma once

#include <cstddef>
#include <deque>
#include <memory>
#include <optional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "engine/request.h"
#include "grpcpp/support/server_callback.h"
#include "memserve/v1/inference.pb.h"
#include "server/gate.h"

namespace memserve::server {

class GenerateReactor final : public grpc::ServerWriteReactor<v1::GenerateResponse>, public engine::GenerateListener {
 public:
  // Hands the request to the engine. The result deletes itself.
  static GenerateReactor* Start(Gate::Pass engine, engine::GenerateRequest request, size_t max_unread_bytes);

  void OnPrompt(engine::PromptDelta delta) override;
  void OnDelta(engine::Delta delta) override;
  void OnFinished(absl::StatusOr<engine::Finished> finished) override;

  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

 private:
  GenerateReactor(Gate::Pass engine, std::string id, size_t max_unread_bytes);

  struct Unread {
    v1::GenerateResponse message;
    size_t bytes = 0;
  };

  // Writes what is unread, or gives the stream up where that is too much.
  void Heard(bool too_slow);
  void Append(engine::Delta delta) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Starts the next write, or ends the stream after the last; nothing while an operation is in flight.
  void Proceed();
  // Nothing is kept for the client any more; the stream ends once the engine has let go, with `status` if it is given.
  void GiveUp(std::optional<grpc::Status> status);

  Gate::Pass engine_;
  const std::string id_;
  const size_t max_unread_bytes_;
  std::shared_ptr<GenerateReactor> self_;  // gRPC's share

  absl::Mutex mutex_;
  std::deque<Unread> unread_ ABSL_GUARDED_BY(mutex_);
  size_t unread_bytes_ ABSL_GUARDED_BY(mutex_) = 0;  // of all in unread_
  bool in_flight_ ABSL_GUARDED_BY(mutex_) = false;   // a write, or the end
  bool taken_ ABSL_GUARDED_BY(mutex_) = false;       // the engine runs it under id_
  bool given_up_ ABSL_GUARDED_BY(mutex_) = false;
  std::optional<grpc::Status> given_up_status_ ABSL_GUARDED_BY(mutex_);
  std::optional<grpc::Status> end_ ABSL_GUARDED_BY(mutex_);  // set by the engine's last word
  v1::GenerateResponse message_;                             // belongs to the operation in flight
};

}  // namespace memserve::server
