#include "server/gate.h"

#include <algorithm>

#include "absl/status/status.h"

namespace memserve::server {

void Gate::Open(engine::Engine& engine) {
  const absl::MutexLock lock(&mutex_);
  engine_ = &engine;
  open_ = true;
}

void Gate::Close() {
  const absl::MutexLock lock(&mutex_);
  open_ = false;
}

absl::StatusOr<Gate::Pass> Gate::Enter() {
  const absl::MutexLock lock(&mutex_);
  if (engine_ == nullptr) return absl::UnavailableError("the server is loading its model");
  if (!open_) return absl::UnavailableError("the server is draining and takes no new requests");
  ++passes_;
  return Pass(engine_, [this](engine::Engine*) { Leave(); });
}

absl::StatusOr<engine::Engine*> Gate::Look() const {
  const absl::MutexLock lock(&mutex_);
  if (engine_ == nullptr) return absl::UnavailableError("the server is loading its model");
  return engine_;
}

void Gate::Leave() {
  const absl::MutexLock lock(&mutex_);
  if (--passes_ == 0) changed_.SignalAll();
}

void Gate::WaitUntilEmpty(absl::Time deadline) {
  const absl::MutexLock lock(&mutex_);
  deadline_ = std::min(deadline_, deadline);
  changed_.SignalAll();
  while (passes_ > 0 && absl::Now() < deadline_) changed_.WaitWithDeadline(&mutex_, deadline_);
}

}  // namespace memserve::server
