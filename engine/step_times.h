// What steps cost, measured as they run: how many tokens of prompts may join a step, how long a prompt will take. Engine thread only.
#pragma once

#include <algorithm>
#include <cstdint>

#include "absl/time/time.h"

namespace memserve::engine {

class StepTimes {
 public:
  // A step that decoded for so many sequences and computed so many tokens of prompts took `duration`.
  void Add(int64_t decodes, int64_t prompt_tokens, absl::Duration duration) {
    const double seconds = absl::ToDoubleSeconds(duration);
    if (prompt_tokens == 0) {
      if (decodes > 0) Learn(seconds, decode_step_);
      return;
    }
    // Of a step that does both, what is beyond a decode step is the prompt's.
    if (decodes > 0 && decode_step_ == 0) return;
    const double of_prompt = decodes > 0 ? seconds - decode_step_ : seconds;
    Learn(std::max(of_prompt, 0.0) / static_cast<double>(prompt_tokens), prompt_token_);
  }

  // So many tokens of prompts beside those that decode that the step takes at most kLongest decode steps: then no running stream
  // hears nothing for longer. No limit before both are known.
  int64_t PrefillLimit() const {
    if (decode_step_ == 0 || prompt_token_ == 0) return INT64_MAX;
    return std::max<int64_t>(1, static_cast<int64_t>((kLongest - 1) * decode_step_ / prompt_token_));
  }

  // Of one token of a prompt; 0 before one was computed.
  absl::Duration PromptToken() const { return absl::Seconds(prompt_token_); }

 private:
  static constexpr double kLongest = 2.5;
  static constexpr double kWeight = 0.1;  // of a new measurement

  static void Learn(double measured, double& known) { known = known == 0 ? measured : known + kWeight * (measured - known); }

  double decode_step_ = 0;   // seconds
  double prompt_token_ = 0;  // seconds
};

}  // namespace memserve::engine
