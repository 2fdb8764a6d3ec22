// One call of Trace: a generation of one token whose traces are the answer.
//
// gRPC owns it until OnDone and the engine until it drops its listener, whichever is later.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <utility>

#include "engine/request.h"
#include "grpcpp/support/server_callback.h"
#include "memserve/v1/memory.pb.h"
#include "server/gate.h"

namespace memserve::server {

class TraceReactor final : public grpc::ServerUnaryReactor, public engine::GenerateListener {
 public:
  // Hands the request to the engine. The result deletes itself; `response` is gRPC's and lives until then.
  static TraceReactor* Start(Gate::Pass engine, engine::GenerateRequest request, v1::TraceResponse& response);

  void OnDelta(engine::Delta delta) override;
  void OnFinished(absl::StatusOr<engine::Finished> finished) override;

  void OnCancel() override;
  void OnDone() override;

 private:
  TraceReactor(Gate::Pass engine, std::string id, v1::TraceResponse& response)
      : engine_(std::move(engine)), id_(std::move(id)), response_(response) {}

  Gate::Pass engine_;
  const std::string id_;
  v1::TraceResponse& response_;
  std::shared_ptr<TraceReactor> self_;  // gRPC's share
  std::atomic<bool> engine_runs_ = true;
};

}  // namespace memserve::server
