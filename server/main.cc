// memserve: flags → options → server and engine, until a signal.
#include <semaphore.h>

#include <csignal>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <memory>
#include <thread>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "engine/engine.h"
#include "server/converted_checkpoint.h"
#include "server/logging.h"
#include "server/options.h"
#include "server/server.h"
#include "spdlog/spdlog.h"

namespace {

using memserve::engine::Engine;
using memserve::server::Options;
using memserve::server::Server;

// All that a signal handler may touch. Before it is installed a signal ends the process at once: there is nothing to drain yet.
sem_t stop_signals;

void OnStopSignal(int) { sem_post(&stop_signals); }

void WaitForStopSignal() {
  while (sem_wait(&stop_signals) != 0) {
  }
}

// Returns the engine's failure if that comes first.
absl::Status ServeUntilStopSignal(Server& server) {
  while (server.status().ok()) {
    timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 1;
    if (sem_timedwait(&stop_signals, &until) == 0) return absl::OkStatus();
    server.WatchProgress(absl::Now());
  }
  return server.status();
}

void DrainUntilSecondSignal(Server& server, absl::Duration limit) {
  std::thread second([&server] {
    WaitForStopSignal();
    server.Drain(absl::ZeroDuration());
  });
  server.Drain(limit);
  OnStopSignal(0);  // if no second one came, this lets the thread go
  second.join();
}

// A checkpoint in another format is replaced by its conversion; the model keeps the source's name.
absl::Status Convert(Options& options) {
  std::string& checkpoint = options.engine.checkpoint;
  absl::StatusOr<std::string> converted = memserve::server::ConvertedCheckpoint(checkpoint, options.server.convert_cache);
  if (!converted.ok()) return converted.status();
  if (*converted != checkpoint && options.engine.model_name.empty()) {
    while (checkpoint.size() > 1 && checkpoint.back() == '/') checkpoint.pop_back();
    options.engine.model_name = std::filesystem::path(checkpoint).stem();
  }
  checkpoint = *std::move(converted);
  return absl::OkStatus();
}

absl::Status Run(int argc, char** argv) {
  absl::StatusOr<Options> options = memserve::server::ParseCommandLine(argc, argv);
  if (!options.ok()) return options.status();
  memserve::server::SetUpLogging(options->server);

  if (options->engine.dry_run) {
    if (absl::Status status = Convert(*options); !status.ok()) return status;
    return Engine::Create(options->engine).status();
  }
  absl::StatusOr<std::unique_ptr<Server>> server = Server::Listen(options->server);
  if (!server.ok()) return server.status();
  if (absl::Status status = Convert(*options); !status.ok()) return status;
  absl::StatusOr<std::unique_ptr<Engine>> engine = Engine::Create(options->engine);
  if (!engine.ok()) return engine.status();

  sem_init(&stop_signals, 0, 0);
  std::signal(SIGTERM, OnStopSignal);
  std::signal(SIGINT, OnStopSignal);
  if (absl::Status status = (*server)->Serve(*std::move(engine)); !status.ok()) return status;
  if (absl::Status status = ServeUntilStopSignal(**server); !status.ok()) return status;
  spdlog::info("draining: new requests are refused, those that run have {} s; a second signal ends them",
               options->server.drain_seconds);
  DrainUntilSecondSignal(**server, absl::Seconds(options->server.drain_seconds));
  spdlog::info("drained");
  return absl::OkStatus();
}

}  // namespace

int main(int argc, char** argv) {
  const absl::Status status = Run(argc, argv);
  if (status.ok()) return 0;
  std::fprintf(stderr, "memserve: %.*s\n", static_cast<int>(status.message().size()), status.message().data());
  return 1;
}
