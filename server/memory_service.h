// memserve.v1.Memory over an engine.
#pragma once

#include "memserve/v1/memory.grpc.pb.h"
#include "server/gate.h"

namespace memserve::server {

class MemoryService final : public v1::Memory::CallbackService {
 public:
  explicit MemoryService(Gate& gate) : gate_(gate) {}

  grpc::ServerUnaryReactor* ListTables(grpc::CallbackServerContext* context, const v1::ListTablesRequest* request,
                                       v1::ListTablesResponse* response) override;

 private:
  Gate& gate_;
};

}  // namespace memserve::server
