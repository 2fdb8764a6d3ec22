// config.json of a Hugging Face folder: llama, mistral, qwen2, qwen3 as dense trunks.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "engine/model/config.h"
#include "nlohmann/json_fwd.hpp"

namespace memserve::engine {

bool IsHuggingFaceType(const std::string& model_type);

// Absent keys have transformers' defaults. What the model would compute differently here is refused in one line.
absl::StatusOr<ModelConfig> ParseHuggingFaceConfig(const nlohmann::json& document, const std::string& where);

}  // namespace memserve::engine
