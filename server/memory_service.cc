#include "server/memory_service.h"

#include "server/convert.h"

namespace memserve::server {

grpc::ServerUnaryReactor* MemoryService::ListTables(grpc::CallbackServerContext* context, const v1::ListTablesRequest*,
                                                    v1::ListTablesResponse* response) {
  absl::StatusOr<engine::Engine*> engine = gate_.Look();
  if (engine.ok()) *response = TablesToProto((*engine)->model());
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(ToGrpc(engine.status()));
  return reactor;
}

}  // namespace memserve::server
