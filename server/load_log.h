// What the engine is doing, as a line of the log now and then while it works.
//
// One thread.
#pragma once

#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_format.h"
#include "absl/time/time.h"
#include "engine/engine.h"

namespace memserve::server {

class LoadLog {
 public:
  explicit LoadLog(absl::Duration between) : between_(between) {}  // lines; zero: none

  // The line that is due at `now`, if something was done since the one before. To be asked again and again; times ascend.
  std::optional<std::string> Line(const engine::Load& load, absl::Time now) {
    if (between_ == absl::ZeroDuration() || now - told_ < between_) return std::nullopt;
    const double seconds = absl::ToDoubleSeconds(now - told_);
    const bool first = told_ == absl::InfinitePast();
    const engine::Load before = std::exchange(before_, load);
    told_ = now;
    if (first || (load.requests == 0 && load.steps == before.steps)) return std::nullopt;
    const auto rate = [&](int64_t of, int64_t then) { return static_cast<double>(of - then) / seconds; };
    return absl::StrFormat(
        "load: %d running, %d waiting (%d preempted, %d tokens); pages %d used, %d cached, %d free; prompt %.0f tokens/s, drawn "
        "%.0f tokens/s; "
        "%.0f steps/s of %.2f ms (median; p99 %.2f)",
        load.running, load.waiting, load.preempted, load.waiting_tokens, load.kv_pages_used, load.kv_pages_cached,
        load.kv_pages_total - load.kv_pages_used - load.kv_pages_cached, rate(load.prompt_tokens, before.prompt_tokens),
        rate(load.completion_tokens, before.completion_tokens), rate(load.steps, before.steps), 1e3 * load.recent.median_seconds,
        1e3 * load.recent.p99_seconds);
  }

 private:
  const absl::Duration between_;
  absl::Time told_ = absl::InfinitePast();
  engine::Load before_;
};

}  // namespace memserve::server
