#include "server/inference_service.h"

#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/convert.h"
#include "server/generate_reactor.h"
#include "server/score_reactor.h"

namespace memserve::server {
namespace {

class RefusedStream final : public grpc::ServerWriteReactor<v1::GenerateResponse> {
 public:
  explicit RefusedStream(const absl::Status& status) { Finish(ToGrpc(status)); }
  void OnDone() override { delete this; }
};

grpc::ServerUnaryReactor* Finish(grpc::CallbackServerContext& context, const absl::Status& status = absl::OkStatus()) {
  grpc::ServerUnaryReactor* reactor = context.DefaultReactor();
  reactor->Finish(ToGrpc(status));
  return reactor;
}

}  // namespace

grpc::ServerWriteReactor<v1::GenerateResponse>* InferenceService::Generate(grpc::CallbackServerContext* context,
                                                                           const v1::GenerateRequest* request) {
  absl::StatusOr<Gate::Pass> engine = gate_.Enter();
  if (!engine.ok()) return new RefusedStream(engine.status());
  absl::StatusOr<engine::GenerateRequest> generate = ToEngine(*request, (*engine)->model(), Deadline(*context));
  if (!generate.ok()) return new RefusedStream(generate.status());
  return GenerateReactor::Start(*std::move(engine), *std::move(generate), options_.max_unread_bytes);
}

grpc::ServerUnaryReactor* InferenceService::Score(grpc::CallbackServerContext* context, const v1::ScoreRequest* request,
                                                  v1::ScoreResponse* response) {
  absl::StatusOr<Gate::Pass> engine = gate_.Enter();
  if (!engine.ok()) return Finish(*context, engine.status());
  absl::StatusOr<engine::ScoreRequest> score = ToEngine(*request, (*engine)->model(), Deadline(*context));
  if (!score.ok()) return Finish(*context, score.status());
  return ScoreReactor::Start(*std::move(engine), *std::move(score), *response);
}

grpc::ServerUnaryReactor* InferenceService::Tokenize(grpc::CallbackServerContext* context, const v1::TokenizeRequest* request,
                                                     v1::TokenizeResponse* response) {
  absl::StatusOr<Gate::Pass> engine = gate_.Enter();
  if (!engine.ok()) return Finish(*context, engine.status());
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  (*engine)->Tokenize(request->text(), request->add_bos(), request->allow_special(),
                      [reactor, response, pass = *engine](absl::StatusOr<std::vector<int32_t>> ids) {
                        if (ids.ok()) response->mutable_token_ids()->Assign(ids->begin(), ids->end());
                        reactor->Finish(ToGrpc(ids.status()));
                      });
  return reactor;
}

grpc::ServerUnaryReactor* InferenceService::Detokenize(grpc::CallbackServerContext* context, const v1::DetokenizeRequest* request,
                                                       v1::DetokenizeResponse* response) {
  absl::StatusOr<Gate::Pass> engine = gate_.Enter();
  if (!engine.ok()) return Finish(*context, engine.status());
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  (*engine)->Detokenize({request->token_ids().begin(), request->token_ids().end()}, request->keep_special(),
                        [reactor, response, pass = *engine](absl::StatusOr<std::string> text) {
                          if (text.ok()) response->set_text(*std::move(text));
                          reactor->Finish(ToGrpc(text.status()));
                        });
  return reactor;
}

grpc::ServerUnaryReactor* InferenceService::GetModel(grpc::CallbackServerContext* context, const v1::GetModelRequest*,
                                                     v1::GetModelResponse* response) {
  absl::StatusOr<engine::Engine*> engine = gate_.Look();
  if (engine.ok()) *response = ToProto((*engine)->model());
  return Finish(*context, engine.status());
}

grpc::ServerUnaryReactor* InferenceService::GetLoad(grpc::CallbackServerContext* context, const v1::GetLoadRequest*,
                                                    v1::GetLoadResponse* response) {
  absl::StatusOr<engine::Engine*> engine = gate_.Look();
  if (engine.ok()) *response = ToProto((*engine)->load());
  return Finish(*context, engine.status());
}

grpc::ServerUnaryReactor* InferenceService::Abort(grpc::CallbackServerContext* context, const v1::AbortRequest* request,
                                                  v1::AbortResponse* response) {
  absl::StatusOr<engine::Engine*> engine = gate_.Look();
  if (!engine.ok()) return Finish(*context, engine.status());
  int aborted = 0;
  for (const std::string& id : request->request_ids()) aborted += (*engine)->Cancel(id) ? 1 : 0;
  response->set_aborted(aborted);
  return Finish(*context);
}

}  // namespace memserve::server
