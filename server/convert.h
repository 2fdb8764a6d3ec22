// proto ↔ engine, absl::Status → grpc::Status: the only place that translates. Values are checked by the engine
// (engine/validate.h); here only what it cannot see: a oneof that is not set, and the model's name.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/engine.h"
#include "engine/request.h"
#include "grpcpp/server_context.h"
#include "grpcpp/support/status.h"
#include "memserve/v1/inference.pb.h"
#include "memserve/v1/memory.pb.h"

namespace memserve::server {

// INVALID_ARGUMENT, or NOT_FOUND for a model of another name. The id is drawn if the client gave none.
absl::StatusOr<engine::GenerateRequest> ToEngine(const v1::GenerateRequest& request, const engine::ModelInfo& model,
                                                 absl::Time deadline);
absl::StatusOr<engine::ScoreRequest> ToEngine(const v1::ScoreRequest& request, const engine::ModelInfo& model, absl::Time deadline);

// Appends a delta to one that waits.
void Join(engine::Delta delta, v1::Delta& waiting);
v1::PromptDelta ToProto(engine::PromptDelta delta);
v1::Finished ToProto(engine::Finished finished, const std::string& request_id);
v1::ScoreResponse ToProto(const engine::ScoreResult& result, const std::string& request_id);
v1::GetModelResponse ToProto(const engine::ModelInfo& model);
v1::GetLoadResponse ToProto(const engine::Load& load);
v1::TokenTrace ToProto(const engine::TokenTrace& trace);

// Of service Memory. UNIMPLEMENTED or INVALID_ARGUMENT: there is no such table.
absl::StatusOr<v1::GetTableResponse> ToTables(const v1::GetTableRequest& request, const engine::ModelInfo& model);
engine::ReadRowsRequest ToEngine(const v1::GetRowsRequest& request);
v1::GetRowsResponse ToProto(const engine::TableRows& rows, const v1::GetRowsRequest& request);
engine::RowStatsRequest ToEngine(const v1::RowStatsRequest& request);
v1::RowStatsResponse ToProto(const engine::RowStats& stats, const v1::RowStatsRequest& request);
// A generation of one token, with traces.
absl::StatusOr<engine::GenerateRequest> ToEngine(const v1::TraceRequest& request, const engine::ModelInfo& model,
                                                 absl::Time deadline);

absl::Time Deadline(const grpc::CallbackServerContext& context);

// RESOURCE_EXHAUSTED carries google.rpc.RetryInfo.
grpc::Status ToGrpc(const absl::Status& status);

}  // namespace memserve::server
