#include "server/memory_service.h"

#include <utility>

#include "server/convert.h"
#include "server/trace_reactor.h"

namespace memserve::server {
namespace {

grpc::ServerUnaryReactor* Finish(grpc::CallbackServerContext& context, const absl::Status& status) {
  grpc::ServerUnaryReactor* reactor = context.DefaultReactor();
  reactor->Finish(ToGrpc(status));
  return reactor;
}

}  // namespace

grpc::ServerUnaryReactor* MemoryService::GetTable(grpc::CallbackServerContext* context, const v1::GetTableRequest* request,
                                                  v1::GetTableResponse* response) {
  absl::StatusOr<engine::Engine*> engine = gate_.Look();
  if (!engine.ok()) return Finish(*context, engine.status());
  absl::StatusOr<v1::GetTableResponse> tables = ToTables(*request, (*engine)->model());
  if (tables.ok()) *response = *std::move(tables);
  return Finish(*context, tables.status());
}

grpc::ServerUnaryReactor* MemoryService::GetRows(grpc::CallbackServerContext* context, const v1::GetRowsRequest* request,
                                                 v1::GetRowsResponse* response) {
  absl::StatusOr<Gate::Pass> engine = gate_.Enter();
  if (!engine.ok()) return Finish(*context, engine.status());
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  (*engine)->ReadRows(ToEngine(*request),
                      [reactor, request, response, pass = *engine](const absl::StatusOr<engine::TableRows>& rows) {
                        if (rows.ok()) *response = ToProto(*rows, *request);
                        reactor->Finish(ToGrpc(rows.status()));
                      });
  return reactor;
}

grpc::ServerUnaryReactor* MemoryService::RowStats(grpc::CallbackServerContext* context, const v1::RowStatsRequest* request,
                                                  v1::RowStatsResponse* response) {
  absl::StatusOr<Gate::Pass> engine = gate_.Enter();
  if (!engine.ok()) return Finish(*context, engine.status());
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  (*engine)->CountRows(ToEngine(*request),
                       [reactor, request, response, pass = *engine](const absl::StatusOr<engine::RowStats>& stats) {
                         if (stats.ok()) *response = ToProto(*stats, *request);
                         reactor->Finish(ToGrpc(stats.status()));
                       });
  return reactor;
}

grpc::ServerUnaryReactor* MemoryService::Trace(grpc::CallbackServerContext* context, const v1::TraceRequest* request,
                                               v1::TraceResponse* response) {
  absl::StatusOr<Gate::Pass> engine = gate_.Enter();
  if (!engine.ok()) return Finish(*context, engine.status());
  absl::StatusOr<engine::GenerateRequest> trace = ToEngine(*request, (*engine)->model(), Deadline(*context));
  if (!trace.ok()) return Finish(*context, trace.status());
  return TraceReactor::Start(*std::move(engine), *std::move(trace), *response);
}

}  // namespace memserve::server
