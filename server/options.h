// Everything that can be set about the server: default and unit beside each field. Each has a flag of its name, and so have the
// engine's options.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/options.h"

namespace memserve::server {

struct ServerOptions {
  std::string grpc_address = "127.0.0.1:50051";  // host:port; port 0 takes a free one
  bool allow_public = false;                     // an address that other machines reach; there is no authentication yet
  std::string port_file;                         // gets the bound port once requests are answered; empty: none
  int drain_seconds = 30;                        // what runs may go on for so long after SIGTERM
  int stall_seconds = 60;                        // no step for so long although requests wait: not ready
  int max_message_bytes = 8 << 20;               // of one request
  int max_unread_bytes = 4 << 20;                // of one stream whose reader is slow; beyond it the stream is ended
  int log_load_seconds = 10;                     // between two lines that say what the engine does, while it works; 0: none
  std::string log_level = "info";                // trace, debug, info, warning, error
  std::string convert_cache;                     // folder for converted checkpoints; empty: such checkpoints are refused
  bool log_json = false;                         // one JSON object a line instead of text
};

struct Options {
  ServerOptions server;
  engine::EngineOptions engine;
};

// Reads the flags (and prints --help and ends the process, if that is asked). The engine checks its own options.
absl::StatusOr<Options> ParseCommandLine(int argc, char** argv);

// INVALID_ARGUMENT names flag, value and limit.
absl::Status Check(const ServerOptions& options);

}  // namespace memserve::server
