#include "server/score_reactor.h"

#include <utility>

#include "server/convert.h"

namespace memserve::server {

ScoreReactor* ScoreReactor::Start(Gate::Pass engine, engine::ScoreRequest request, v1::ScoreResponse& response) {
  auto* reactor = new ScoreReactor(std::move(engine), request.id);
  const std::string id =
      reactor->engine_->Score(std::move(request), [reactor, &response](absl::StatusOr<engine::ScoreResult> result) {
        reactor->engine_runs_ = false;
        if (result.ok()) response = ToProto(*result, reactor->id_);
        reactor->Finish(ToGrpc(result.status()));
      });
  // gRPC binds the reactor after this returns: it cannot be done yet.
  if (id.empty()) reactor->engine_runs_ = false;
  return reactor;
}

// Not one that was refused or has ended: the id may be another request's.
void ScoreReactor::OnCancel() {
  if (engine_runs_) engine_->Cancel(id_);
}

}  // namespace memserve::server
