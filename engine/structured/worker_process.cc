#include "engine/structured/worker_process.h"

#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <string_view>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "engine/structured/frame.h"

namespace memserve::engine {
namespace {

constexpr absl::Duration kLook = absl::Milliseconds(20);  // whether an answer is still wanted
constexpr int kMostWait = 4;                              // times the processor time that is allowed

absl::Status Gone() { return absl::InternalError("the grammar worker is gone"); }

}  // namespace

std::string FindWorker() {
  std::error_code error;
  const std::filesystem::path folder = std::filesystem::read_symlink("/proc/self/exe", error).parent_path();
  for (const char* place : {"memserve-grammar", "../engine/memserve-grammar"}) {
    if (std::filesystem::exists(folder / place, error)) return folder / place;
  }
  return "memserve-grammar";
}

absl::StatusOr<std::unique_ptr<WorkerProcess>> WorkerProcess::Start(const std::string& program,
                                                                    const std::vector<std::string>& arguments) {
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) {
    return absl::InternalError(absl::StrCat("socketpair: ", std::strerror(errno)));
  }
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, ends[1], STDIN_FILENO);
  posix_spawn_file_actions_addclosefrom_np(&actions, STDERR_FILENO + 1);
  // A group of its own: Ctrl-C is for the server, which may still want an answer while it drains. No signal blocked, none ignored.
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  sigset_t none, all;
  sigemptyset(&none);
  sigfillset(&all);
  posix_spawnattr_setsigmask(&attributes, &none);
  posix_spawnattr_setsigdefault(&attributes, &all);
  posix_spawnattr_setpgroup(&attributes, 0);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
  std::vector<char*> argv = {const_cast<char*>(program.c_str())};
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  pid_t pid = 0;
  const int error = posix_spawnp(&pid, program.c_str(), &actions, &attributes, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  posix_spawnattr_destroy(&attributes);
  close(ends[1]);
  if (error != 0) {
    close(ends[0]);
    return absl::UnimplementedError(absl::StrCat("structured: '", program, "' cannot be started: ", std::strerror(error)));
  }
  fcntl(ends[0], F_SETFL, O_NONBLOCK);
  return std::unique_ptr<WorkerProcess>(new WorkerProcess(pid, ends[0]));
}

WorkerProcess::~WorkerProcess() {
  close(socket_);
  kill(pid_, SIGKILL);
  while (waitpid(pid_, nullptr, 0) < 0 && errno == EINTR) continue;
}

absl::Duration WorkerProcess::ProcessorTime() const {
  clockid_t clock;
  timespec used = {};
  if (clock_getcpuclockid(pid_, &clock) == 0) clock_gettime(clock, &used);
  return absl::DurationFromTimespec(used);
}

absl::Status WorkerProcess::Await(short events, absl::Duration timeout, const std::function<bool()>& wanted) {
  while (true) {
    if (!wanted()) return absl::CancelledError("no longer wanted");
    if (ProcessorTime() - used_before_ > timeout || absl::Now() - asked_ > kMostWait * timeout)
      return absl::DeadlineExceededError("the grammar worker took too long");
    pollfd ready = {.fd = socket_, .events = events};
    if (poll(&ready, 1, static_cast<int>(absl::ToInt64Milliseconds(kLook))) > 0) return absl::OkStatus();
  }
}

absl::StatusOr<std::string> WorkerProcess::Ask(const std::string& frame, absl::Duration timeout, size_t most_bytes,
                                               const std::function<bool()>& wanted) {
  asked_ = absl::Now();
  used_before_ = ProcessorTime();
  std::string bytes;
  AppendNumber(static_cast<uint32_t>(frame.size()), &bytes);
  bytes += frame;
  for (size_t sent = 0; sent < bytes.size();) {
    if (absl::Status s = Await(POLLOUT, timeout, wanted); !s.ok()) return s;
    const ssize_t now = send(socket_, bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
    if (now > 0)
      sent += static_cast<size_t>(now);
    else if (errno != EAGAIN && errno != EINTR)
      return Gone();
  }
  const auto receive = [&](char* to, size_t size) -> absl::Status {
    while (size > 0) {
      if (absl::Status s = Await(POLLIN, timeout, wanted); !s.ok()) return s;
      const ssize_t now = recv(socket_, to, size, 0);
      if (now == 0 || (now < 0 && errno != EAGAIN && errno != EINTR)) return Gone();
      if (now < 0) continue;
      to += now;
      size -= static_cast<size_t>(now);
    }
    return absl::OkStatus();
  };
  char head[4];
  if (absl::Status s = receive(head, sizeof(head)); !s.ok()) return s;
  std::string_view number(head, sizeof(head));
  uint32_t size = 0;
  TakeNumber(&number, &size);
  if (size < 1 || size > most_bytes) return absl::InternalError("the grammar worker's answer is too large");
  std::string answer(size, '\0');
  if (absl::Status s = receive(answer.data(), size); !s.ok()) return s;
  return answer;
}

}  // namespace memserve::engine
