// The gRPC server: listens from the start, answers once it has an engine, drains before it goes.
//
// The port is bound before the checkpoint loads: a port in use is known at once, and probes see "loading" instead of nothing.
#pragma once

#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/engine.h"
#include "grpcpp/server.h"
#include "server/gate.h"
#include "server/inference_service.h"
#include "server/load_log.h"
#include "server/memory_service.h"
#include "server/options.h"
#include "server/progress_watch.h"

namespace memserve::server {

class Server {
 public:
  // UNAVAILABLE: the address cannot be had. Until Serve, requests get UNAVAILABLE; health: "" is serving, the services are not.
  static absl::StatusOr<std::unique_ptr<Server>> Listen(const ServerOptions& options);
  ~Server();  // ends what runs

  int port() const { return port_; }

  // From here on the engine answers. Writes the port file.
  absl::Status Serve(std::unique_ptr<engine::Engine> engine);

  // Not OK once the engine has failed for good: the process is to end.
  absl::Status status() const { return engine_->status(); }

  // To be called about once a second while serving, by the thread that drains: readiness falls while the engine makes no progress
  // although requests wait, and comes back with it.
  void WatchProgress(absl::Time now);

  // Not ready, refuses new work, and waits until what runs has finished or `limit` has passed, then ends the rest. May be called
  // again from another thread with a shorter limit.
  void Drain(absl::Duration limit);

 private:
  explicit Server(const ServerOptions& options);
  void SetReady(bool ready);

  const ServerOptions options_;
  Gate gate_;
  std::unique_ptr<engine::Engine> engine_;
  InferenceService inference_;
  MemoryService memory_;
  std::unique_ptr<grpc::Server> grpc_;
  int port_ = 0;
  ProgressWatch progress_;
  LoadLog load_log_;
  bool progresses_ = true;
};

}  // namespace memserve::server
