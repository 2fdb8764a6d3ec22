// The process that compiles grammars: started, asked, killed.
#pragma once

#include <sys/types.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace memserve::engine {

// memserve-grammar beside the program that runs, or where it is built; else by PATH.
std::string FindWorker();

class WorkerProcess {
 public:
  static absl::StatusOr<std::unique_ptr<WorkerProcess>> Start(const std::string& program,
                                                              const std::vector<std::string>& arguments);
  ~WorkerProcess();  // kills it
  WorkerProcess(const WorkerProcess&) = delete;
  WorkerProcess& operator=(const WorkerProcess&) = delete;

  // Sends a frame and waits for the one that answers it, of at most `most_bytes`. DEADLINE_EXCEEDED once the process has used so
  // much processor time, or several times as much has passed (it is a lower priority's), CANCELLED once `wanted` is false, or
  // INTERNAL if it is gone: then it is of no more use.
  absl::StatusOr<std::string> Ask(const std::string& frame, absl::Duration timeout, size_t most_bytes,
                                  const std::function<bool()>& wanted);

 private:
  WorkerProcess(pid_t pid, int socket) : pid_(pid), socket_(socket) {}
  absl::Duration ProcessorTime() const;
  absl::Status Await(short events, absl::Duration timeout, const std::function<bool()>& wanted);

  const pid_t pid_;
  const int socket_;
  absl::Time asked_;
  absl::Duration used_before_;  // of processor time
};

}  // namespace memserve::engine
