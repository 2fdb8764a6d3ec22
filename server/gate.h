// Who may reach the engine, and when: nobody before it is loaded, no new work while it drains.
#pragma once

#include <memory>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "engine/engine.h"

namespace memserve::server {

class Gate {
 public:
  // Held by a call that works with the engine, until its last word is handed to gRPC.
  using Pass = std::shared_ptr<engine::Engine>;

  // Once. The engine must outlive all passes, and the gate both.
  void Open(engine::Engine& engine);
  void Close();

  absl::StatusOr<Pass> Enter();                  // for work; UNAVAILABLE while loading or draining
  absl::StatusOr<engine::Engine*> Look() const;  // for questions; UNAVAILABLE while loading

  // Returns when no pass is out or the time has come, whichever is first. Another thread may bring the time forward.
  void WaitUntilEmpty(absl::Time deadline);

 private:
  void Leave();

  mutable absl::Mutex mutex_;
  absl::CondVar changed_;
  engine::Engine* engine_ ABSL_GUARDED_BY(mutex_) = nullptr;
  bool open_ ABSL_GUARDED_BY(mutex_) = false;
  int passes_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::Time deadline_ ABSL_GUARDED_BY(mutex_) = absl::InfiniteFuture();
};

}  // namespace memserve::server
