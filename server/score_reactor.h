// One call of Score: answers once, and hears the client leave.
#pragma once

#include <atomic>
#include <string>
#include <utility>

#include "engine/request.h"
#include "grpcpp/support/server_callback.h"
#include "memserve/v1/inference.pb.h"
#include "server/gate.h"

namespace memserve::server {

class ScoreReactor final : public grpc::ServerUnaryReactor {
 public:
  // Hands the request to the engine. The result deletes itself; `response` is gRPC's and lives until then.
  static ScoreReactor* Start(Gate::Pass engine, engine::ScoreRequest request, v1::ScoreResponse& response);

  void OnCancel() override;
  void OnDone() override { delete this; }

 private:
  ScoreReactor(Gate::Pass engine, std::string id) : engine_(std::move(engine)), id_(std::move(id)) {}

  const Gate::Pass engine_;
  const std::string id_;
  std::atomic<bool> engine_runs_ = true;
};

}  // namespace memserve::server
