#include "engine/model/rope_scaling.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "engine/model/config_reader.h"

namespace memserve::engine {
namespace {

constexpr double kPi = 3.14159265358979323846;
constexpr double kMaxFactor = 1e6;

// 0.1 · mscale · ln(scale) + 1: how much sharper attention has to be over a longer context (YaRN, equation 22).
double MagnitudeScale(double scale, double mscale) { return scale <= 1 ? 1.0 : 0.1 * mscale * std::log(scale) + 1.0; }

double YarnAttentionFactor(ConfigReader& reader, double factor) {
  if (reader.Find("attention_factor") != nullptr) return reader.Number("attention_factor", 1e-3, 1e3, 1);
  const double mscale = reader.Number("mscale", 0, 1e3, 0.0), all_dim = reader.Number("mscale_all_dim", 0, 1e3, 0.0);
  if (mscale != 0 && all_dim != 0) return MagnitudeScale(factor, mscale) / MagnitudeScale(factor, all_dim);
  return MagnitudeScale(factor, 1);
}

double Llama3(const RopeScaling& s, double frequency) {
  const double wavelength = 2 * kPi / frequency;
  if (wavelength < s.original_positions / s.high_freq_factor) return frequency;
  if (wavelength > s.original_positions / s.low_freq_factor) return frequency / s.factor;
  const double smooth = (s.original_positions / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
  return ((1 - smooth) / s.factor + smooth) * frequency;
}

struct Ramp {
  double begin, end;
  double operator()(int i) const { return std::clamp((i - begin) / (end - begin), 0.0, 1.0); }
};

Ramp YarnRamp(const RopeScaling& s, double theta, int head_dim) {
  // The index whose frequency turns so many times in the original context.
  const auto index = [&](double rotations) {
    return head_dim * std::log(s.original_positions / (rotations * 2 * kPi)) / (2 * std::log(theta));
  };
  double begin = index(s.beta_fast), end = index(s.beta_slow);
  if (s.truncate) {
    begin = std::floor(begin);
    end = std::ceil(end);
  }
  begin = std::max(begin, 0.0);
  end = std::min(end, head_dim - 1.0);
  if (begin == end) end += 0.001;
  return {begin, end};
}

}  // namespace

absl::StatusOr<RopeScaling> ParseRopeScaling(const nlohmann::json& object, const std::string& where, int max_positions) {
  ConfigReader reader(object, where);
  RopeScaling scaling;
  const std::string type = reader.String(reader.Find("rope_type") != nullptr ? "rope_type" : "type", "default");
  if (!reader.status().ok()) return reader.status();
  for (const auto& [key, value] : object.items()) {
    if (value.is_object())
      reader.Fail(absl::StrCat("'", key.substr(0, 40), "' is an object; frequencies that differ by layer are not supported"));
  }
  if (reader.Number("partial_rotary_factor", 0, 1, 1) != 1)
    reader.Fail("partial_rotary_factor is not 1: only whole heads are turned here");
  if (type == "default") {
    scaling.type = RopeScaling::Type::kDefault;
    return reader.status().ok() ? absl::StatusOr<RopeScaling>(scaling) : reader.status();
  }
  if (type == "linear") {
    scaling.type = RopeScaling::Type::kLinear;
  } else if (type == "llama3") {
    scaling.type = RopeScaling::Type::kLlama3;
  } else if (type == "yarn") {
    scaling.type = RopeScaling::Type::kYarn;
  } else {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": rope_type is '", type.substr(0, 40), "'; known are default, linear, llama3, yarn"));
  }
  scaling.factor = reader.Number("factor", 1, kMaxFactor, std::nullopt);
  if (scaling.type != RopeScaling::Type::kLinear) {
    scaling.original_positions = reader.Number("original_max_position_embeddings", 1, kMaxPositions, max_positions);
  }
  if (scaling.type == RopeScaling::Type::kLlama3) {
    scaling.low_freq_factor = reader.Number("low_freq_factor", 1e-3, kMaxFactor, std::nullopt);
    scaling.high_freq_factor = reader.Number("high_freq_factor", 1e-3, kMaxFactor, std::nullopt);
    if (reader.status().ok() && scaling.high_freq_factor <= scaling.low_freq_factor) {
      reader.Fail(absl::StrCat("high_freq_factor is ", scaling.high_freq_factor, "; it must be above low_freq_factor, ",
                               scaling.low_freq_factor));
    }
  }
  if (scaling.type == RopeScaling::Type::kYarn) {
    scaling.beta_fast = reader.Number("beta_fast", 1e-3, kMaxFactor, 32);
    scaling.beta_slow = reader.Number("beta_slow", 1e-3, kMaxFactor, 1);
    scaling.truncate = reader.Bool("truncate", true);
    scaling.attention_factor = YarnAttentionFactor(reader, scaling.factor);
    if (reader.status().ok() && scaling.beta_fast < scaling.beta_slow) {
      reader.Fail(absl::StrCat("beta_fast is ", scaling.beta_fast, "; it must not be below beta_slow, ", scaling.beta_slow));
    }
  }
  if (!reader.status().ok()) return reader.status();
  return scaling;
}

std::vector<double> RopeFrequencies(const RopeScaling& scaling, double rope_theta, int head_dim) {
  std::vector<double> frequencies(head_dim / 2);
  const Ramp ramp = scaling.type == RopeScaling::Type::kYarn ? YarnRamp(scaling, rope_theta, head_dim) : Ramp{0, 1};
  for (int i = 0; i < head_dim / 2; ++i) {
    double& frequency = frequencies[i];
    frequency = std::pow(rope_theta, -2.0 * i / head_dim);
    switch (scaling.type) {
      case RopeScaling::Type::kDefault:
        break;
      case RopeScaling::Type::kLinear:
        frequency /= scaling.factor;
        break;
      case RopeScaling::Type::kLlama3:
        frequency = Llama3(scaling, frequency);
        break;
      case RopeScaling::Type::kYarn:
        frequency = (1 - ramp(i)) * frequency + ramp(i) * frequency / scaling.factor;
        break;
    }
  }
  return frequencies;
}

}  // namespace memserve::engine
