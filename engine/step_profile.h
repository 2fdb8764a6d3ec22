// Where the time of recent steps went. Engine thread only but for what is copied out.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace memserve::engine {

// Seconds of one step, by the engine thread's clock; `output` is the output thread's, which works beside it.
struct StepPhases {
  float schedule = 0;   // cancellations, scheduler, filling the batch and copying it to the device
  float forward = 0;    // the model, logits included, and waiting for it
  float sample = 0;     // from logits to tokens and scores
  float hand_over = 0;  // tokens to sequences, ends, gauges, to the output thread
  float output = 0;     // detokenising, stop strings, calling listeners

  float step() const { return schedule + forward + sample + hand_over; }
};

// Of the steps in the window.
struct StepSummary {
  int64_t steps = 0;
  double median_seconds = 0, p99_seconds = 0;
  // Of the seconds of the faster half, which nothing else on the machine held up; the first four come to 1.
  double schedule_share = 0, forward_share = 0, sample_share = 0, hand_over_share = 0, output_share = 0;
};

class StepProfile {
 public:
  static constexpr int64_t kWindow = 1024;  // steps

  void Add(const StepPhases& phases) {
    window_[count_ % kWindow] = phases;
    ++count_;
  }

  StepSummary Summary() const {
    StepSummary summary = {.steps = std::min(count_, kWindow)};
    if (summary.steps == 0) return summary;
    std::vector<float> steps;
    for (int64_t i = 0; i < summary.steps; ++i) steps.push_back(window_[i].step());
    const auto at = [&](double share) {
      const auto place = steps.begin() + static_cast<int64_t>(share * static_cast<double>(summary.steps - 1));
      std::nth_element(steps.begin(), place, steps.end());
      return *place;
    };
    const float median = at(0.5);
    summary.median_seconds = median;
    summary.p99_seconds = at(0.99);
    StepPhases sum;
    for (int64_t i = 0; i < summary.steps; ++i) {
      const StepPhases& phases = window_[i];
      if (phases.step() > median) continue;
      sum.schedule += phases.schedule;
      sum.forward += phases.forward;
      sum.sample += phases.sample;
      sum.hand_over += phases.hand_over;
      sum.output += phases.output;
    }
    const double all = std::max(sum.step(), 1e-12f);
    summary.schedule_share = sum.schedule / all;
    summary.forward_share = sum.forward / all;
    summary.sample_share = sum.sample / all;
    summary.hand_over_share = sum.hand_over / all;
    summary.output_share = sum.output / all;
    return summary;
  }

 private:
  int64_t count_ = 0;
  std::array<StepPhases, kWindow> window_;
};

}  // namespace memserve::engine
