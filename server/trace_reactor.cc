#include "server/trace_reactor.h"

#include <utility>

#include "server/convert.h"

namespace memserve::server {

TraceReactor* TraceReactor::Start(Gate::Pass engine, engine::GenerateRequest request, v1::TraceResponse& response) {
  std::shared_ptr<TraceReactor> reactor(new TraceReactor(std::move(engine), request.id, response));
  reactor->self_ = reactor;
  // gRPC binds the reactor after this returns: it cannot be done yet.
  if (reactor->engine_->Generate(std::move(request), reactor).empty()) reactor->engine_runs_ = false;
  return reactor.get();
}

void TraceReactor::OnDelta(engine::Delta delta) {
  for (engine::TokenTrace& trace : delta.memory_traces) *response_.add_tokens() = ToProto(trace);
}

void TraceReactor::OnFinished(absl::StatusOr<engine::Finished> finished) {
  engine_runs_ = false;
  if (finished.ok()) {
    *response_.mutable_usage() = ToProto(*finished, id_).usage();
    response_.set_request_id(id_);
  }
  Finish(ToGrpc(finished.status()));
}

// Not one that was refused or has ended: the id may be another request's.
void TraceReactor::OnCancel() {
  if (engine_runs_) engine_->Cancel(id_);
}

void TraceReactor::OnDone() {
  engine_.reset();
  const std::shared_ptr<TraceReactor> last_share = std::move(self_);
}

}  // namespace memserve::server
