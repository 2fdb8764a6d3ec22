#include "clients/call.h"

#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <mutex>
#include <string>
#include <thread>

#include "clients/commands.h"
#include "grpc/support/log.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/security/credentials.h"
#include "grpcpp/support/channel_arguments.h"

namespace memserve::clients {
namespace {

// The signal thread outlives main's variables, hence never destroyed.
struct Interrupts {
  std::mutex mutex;
  grpc::ClientContext* running = nullptr;
  bool interrupted = false;
};
Interrupts& TheInterrupts() {
  static auto* const interrupts = new Interrupts;
  return *interrupts;
}

sigset_t InterruptSignal() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  return signals;
}

void WaitForInterrupts() {
  const sigset_t signals = InterruptSignal();
  for (int signal = 0; sigwait(&signals, &signal) == 0;) {
    Interrupts& interrupts = TheInterrupts();
    const std::lock_guard lock(interrupts.mutex);
    if (interrupts.interrupted || interrupts.running == nullptr) _exit(kInterrupted);
    interrupts.interrupted = true;
    interrupts.running->TryCancel();
  }
}

// One failed try to connect would fail all calls for gRPC's first back-off, a second: a try may fail on a machine under load
// although the server is there, so it is made again for a while. The call then says what is wrong.
std::shared_ptr<grpc::Channel> Connect(const Options& options) {
  constexpr int kRetryMs = 100;
  constexpr std::chrono::milliseconds kPatience{1500};
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, kRetryMs);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, kRetryMs);
  auto channel = grpc::CreateCustomChannel(options.address, grpc::InsecureChannelCredentials(), arguments);
  channel->WaitForConnected(std::chrono::system_clock::now() + kPatience);
  return channel;
}

const char* CodeName(grpc::StatusCode code) {
  static constexpr const char* kNames[] = {
      "OK",        "CANCELLED",      "UNKNOWN",           "INVALID_ARGUMENT",   "DEADLINE_EXCEEDED",
      "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
      "ABORTED",   "OUT_OF_RANGE",   "UNIMPLEMENTED",     "INTERNAL",           "UNAVAILABLE",
      "DATA_LOSS", "UNAUTHENTICATED"};
  return code >= 0 && code <= 16 ? kNames[code] : "UNKNOWN";
}

}  // namespace

void CatchInterrupts() {
  gpr_set_log_function([](gpr_log_func_args*) {});  // what matters of it comes as a status
  const sigset_t signals = InterruptSignal();
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  std::thread(WaitForInterrupts).detach();
}

Call::Call(const Options& options) {
  if (options.timeout_seconds.has_value()) {
    context_.set_deadline(std::chrono::system_clock::now() +
                          std::chrono::microseconds(static_cast<int64_t>(*options.timeout_seconds * 1e6)));
  }
  const std::lock_guard lock(TheInterrupts().mutex);
  TheInterrupts().running = &context_;
}

Call::~Call() {
  const std::lock_guard lock(TheInterrupts().mutex);
  TheInterrupts().running = nullptr;
}

std::unique_ptr<v1::Inference::Stub> ConnectInference(const Options& options) { return v1::Inference::NewStub(Connect(options)); }
std::unique_ptr<v1::Memory::Stub> ConnectMemory(const Options& options) { return v1::Memory::NewStub(Connect(options)); }

int ExitStatus(const grpc::Status& status) {
  if (status.ok()) return kOk;
  std::fprintf(stderr, "%s: %s\n", CodeName(status.error_code()), status.error_message().c_str());
  const std::lock_guard lock(TheInterrupts().mutex);
  return TheInterrupts().interrupted ? kInterrupted : kRpcError;
}

}  // namespace memserve::clients
