// Tells an engine that works from one that hangs: it hangs when for longer than a limit there were requests and yet no step was made
// and no request ended. Source of the readiness probe once the engine runs ("healthy means progressing").
//
// One thread.
#pragma once

#include "absl/time/time.h"
#include "engine/engine.h"

namespace memserve::server {

class ProgressWatch {
 public:
  // How long the slowest step (a full prefill batch of a large model) may take.
  explicit ProgressWatch(absl::Duration limit) : limit_(limit) {}

  // Whether the engine moves, given its load at `now`. To be asked again and again; times ascend.
  bool Progresses(const engine::Load& load, absl::Time now) {
    if (load.requests == 0 || load.steps != steps_ || load.ended_requests != ended_requests_) moved_ = now;
    steps_ = load.steps;
    ended_requests_ = load.ended_requests;
    return now - moved_ <= limit_;
  }

 private:
  const absl::Duration limit_;
  int64_t steps_ = -1;
  int64_t ended_requests_ = -1;
  absl::Time moved_ = absl::InfinitePast();
};

}  // namespace memserve::server
