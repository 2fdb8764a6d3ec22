// memserve.v1.Memory over an engine. Every method returns at once: gRPC's threads never wait.
#pragma once

#include "memserve/v1/memory.grpc.pb.h"
#include "server/gate.h"

namespace memserve::server {

class MemoryService final : public v1::Memory::CallbackService {
 public:
  explicit MemoryService(Gate& gate) : gate_(gate) {}

  grpc::ServerUnaryReactor* GetTable(grpc::CallbackServerContext* context, const v1::GetTableRequest* request,
                                     v1::GetTableResponse* response) override;
  grpc::ServerUnaryReactor* GetRows(grpc::CallbackServerContext* context, const v1::GetRowsRequest* request,
                                    v1::GetRowsResponse* response) override;
  grpc::ServerUnaryReactor* RowStats(grpc::CallbackServerContext* context, const v1::RowStatsRequest* request,
                                     v1::RowStatsResponse* response) override;
  grpc::ServerUnaryReactor* Trace(grpc::CallbackServerContext* context, const v1::TraceRequest* request,
                                  v1::TraceResponse* response) override;

 private:
  Gate& gate_;
};

}  // namespace memserve::server
