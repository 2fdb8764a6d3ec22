// How rotary frequencies are changed so that a model reaches beyond the context it was trained with.
//
//   f(i) = rope_theta^(−2i / head_dim)                                                        default
//   f(i) / factor                                                                             linear
//   f(i) / factor for wavelengths 2π / f(i) above original / low_freq_factor, f(i) below original / high_freq_factor, and between
//     them ((1 − s) / factor + s) f(i), s = (original / wavelength − low) / (high − low)      llama3
//   (1 − ramp(i)) f(i) + ramp(i) f(i) / factor, cos and sin times attention_factor            yarn
//
// yarn: ramp rises from 0 to 1 between the indices whose wavelengths turn beta_fast and beta_slow times in the original context.
// Sources: position interpolation (arXiv 2306.15595), Llama 3.1, YaRN (arXiv 2309.00071); keys as Hugging Face spells them.
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "nlohmann/json_fwd.hpp"

namespace memserve::engine {

struct RopeScaling {
  enum class Type { kDefault, kLinear, kLlama3, kYarn };
  Type type = Type::kDefault;
  double factor = 1;
  double original_positions = 0;  // llama3, yarn: the context the model was trained with
  double low_freq_factor = 1;     // llama3
  double high_freq_factor = 4;    // llama3
  double beta_fast = 32;          // yarn
  double beta_slow = 1;           // yarn
  bool truncate = true;           // yarn: the ramp begins and ends on whole indices
  double attention_factor = 1;    // yarn: of cos and sin
};

// Reads `rope_scaling` or `rope_parameters`; `max_positions` stands in for a missing original_max_position_embeddings. Types other
// than those above are refused.
absl::StatusOr<RopeScaling> ParseRopeScaling(const nlohmann::json& object, const std::string& where, int max_positions);

// Angle per position of each pair: [head_dim / 2].
std::vector<double> RopeFrequencies(const RopeScaling& scaling, double rope_theta, int head_dim);

}  // namespace memserve::engine
