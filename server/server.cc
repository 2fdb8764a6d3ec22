#include "server/server.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "grpcpp/ext/proto_server_reflection_plugin.h"
#include "grpcpp/health_check_service_interface.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server_builder.h"
#include "spdlog/spdlog.h"

namespace memserve::server {
namespace {

// A client that vanished without a word is noticed after the sum of both.
constexpr int kKeepaliveMs = 60'000;
constexpr int kKeepaliveTimeoutMs = 20'000;
constexpr int kLeastPingIntervalMs = 10'000;  // clients that ping more often are cut off by gRPC

// Readers see all of the file or none.
absl::Status WritePortFile(const std::string& file, int port) {
  const std::string unfinished = absl::StrCat(file, ".", getpid());
  std::ofstream(unfinished) << port << "\n" << std::flush;
  if (std::ifstream(unfinished).peek() == EOF || std::rename(unfinished.c_str(), file.c_str()) != 0) {
    std::remove(unfinished.c_str());
    return absl::PermissionDeniedError(absl::StrCat("--port_file: cannot write \"", file, "\""));
  }
  return absl::OkStatus();
}

}  // namespace

Server::Server(const ServerOptions& options)
    : options_(options),
      inference_(options_, gate_),
      memory_(gate_),
      progress_(absl::Seconds(options.stall_seconds)),
      load_log_(absl::Seconds(options.log_load_seconds)) {}

absl::StatusOr<std::unique_ptr<Server>> Server::Listen(const ServerOptions& options) {
  if (absl::Status status = Check(options); !status.ok()) return status;
  if (!options.port_file.empty()) std::remove(options.port_file.c_str());  // of a server that was killed
  std::unique_ptr<Server> server(new Server(options));
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  builder.AddListeningPort(options.grpc_address, grpc::InsecureServerCredentials(), &server->port_);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);  // else a second server on one port would share it in silence
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, kLeastPingIntervalMs);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.SetMaxReceiveMessageSize(options.max_message_bytes);
  builder.RegisterService(&server->inference_);
  builder.RegisterService(&server->memory_);
  server->grpc_ = builder.BuildAndStart();
  if (server->grpc_ == nullptr || server->port_ == 0) {
    return absl::UnavailableError(
        absl::StrCat("cannot listen on ", options.grpc_address, ": the port is in use or the address is not this machine's"));
  }
  server->SetReady(false);
  return server;
}

Server::~Server() {
  gate_.Close();
  if (grpc_ != nullptr) grpc_->Shutdown(std::chrono::system_clock::now());  // cancels what is left and waits for its last word
}

absl::Status Server::Serve(std::unique_ptr<engine::Engine> engine) {
  engine_ = std::move(engine);
  gate_.Open(*engine_);
  SetReady(true);
  spdlog::info("ready: {} on {}, port {}", engine_->model().name, options_.grpc_address, port_);
  return options_.port_file.empty() ? absl::OkStatus() : WritePortFile(options_.port_file, port_);
}

void Server::WatchProgress(absl::Time now) {
  const engine::Load load = engine_->load();
  if (const std::optional<std::string> line = load_log_.Line(load, now)) spdlog::info("{}", *line);
  const bool progresses = progress_.Progresses(load, now);
  if (progresses == progresses_) return;
  progresses_ = progresses;
  SetReady(progresses);
  if (progresses) {
    spdlog::info("the engine goes on: ready again");
  } else {
    spdlog::error("no step for {} s although {} requests wait (step {}): not ready", options_.stall_seconds, load.requests, load.steps);
  }
}

void Server::Drain(absl::Duration limit) {
  const absl::Time deadline = absl::Now() + limit;
  gate_.Close();
  SetReady(false);
  engine_->Drain(limit);
  gate_.WaitUntilEmpty(deadline);  // slow readers get what is left for them
}

void Server::SetReady(bool ready) {
  for (const char* service : {v1::Inference::service_full_name(), v1::Memory::service_full_name()}) {
    grpc_->GetHealthCheckService()->SetServingStatus(service, ready);
  }
}

}  // namespace memserve::server
