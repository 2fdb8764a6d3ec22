// What every call has: a connection, a deadline, and a Ctrl-C that cancels it.
#pragma once

#include <memory>

#include "clients/options.h"
#include "grpcpp/client_context.h"
#include "grpcpp/support/status.h"
#include "memserve/v1/inference.grpc.pb.h"
#include "memserve/v1/memory.grpc.pb.h"

namespace memserve::clients {

class Call {
 public:
  explicit Call(const Options& options);
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  grpc::ClientContext& context() { return context_; }

 private:
  grpc::ClientContext context_;
};

std::unique_ptr<v1::Inference::Stub> ConnectInference(const Options& options);
std::unique_ptr<v1::Memory::Stub> ConnectMemory(const Options& options);

// Prints an error as `code: message`; the exit status of the program.
int ExitStatus(const grpc::Status& status);

}  // namespace memserve::clients
