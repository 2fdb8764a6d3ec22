// What steps cost, measured as they run: how many tokens of prompts may join a step, how long a prompt will take. Engine thread
// only.
//
//   seconds ≈ base + token · tokens computed + key · keys that they attend to
//
// The three are followed by a Kalman filter. They are of the model and the machine, not of the sequences, so steps of every kind
// tell of them: a server that is never without prompts sees no step that only decodes, and still knows what one would take.
#pragma once

#include <array>
#include <cstdint>

#include "absl/time/time.h"

namespace memserve::engine {

// What a step computes.
struct StepWork {
  int64_t tokens = 0;
  int64_t keys = 0;  // of all its tokens together, before the window

  // `count` tokens from `position` on.
  void Add(int64_t position, int64_t count) {
    tokens += count;
    keys += count * position + count * (count + 1) / 2;
  }
};

class StepTimes {
 public:
  StepTimes() = default;
  // Known from the start: for tests.
  StepTimes(absl::Duration base, absl::Duration token, absl::Duration key);

  // `only_decodes`: no token of a prompt was among them.
  void Add(const StepWork& work, absl::Duration duration, bool only_decodes = false);

  bool known() const { return known_; }  // whether a step was measured
  absl::Duration Expected(const StepWork& work) const;
  // So many tokens of a prompt, from `position` on, may join the step `work` that it takes at most kLongest times as long as
  // `decodes` alone: then no running stream hears nothing for longer. No limit before a step was measured; may be 0.
  int64_t PrefillLimit(const StepWork& decodes, const StepWork& work, int64_t position) const;
  // Of one token of a prompt; 0 before a step was measured.
  absl::Duration PromptToken() const { return absl::Seconds(cost_[1]); }

 private:
  static constexpr double kLongest = 2.0;
  static constexpr int kCosts = 3;  // base, token, key

  double DecodeSeconds(const StepWork& decodes) const;

  bool known_ = false;
  StepWork last_decodes_;                                           // the last step that only decoded, and
  double decode_seconds_ = 0;                                       // what such steps took lately
  std::array<double, kCosts> cost_ = {};                            // seconds
  std::array<std::array<double, kCosts>, kCosts> covariance_ = {};  // of what is not known of them
};

}  // namespace memserve::engine
