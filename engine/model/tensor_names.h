// How a checkpoint spells the tensors of a model. The engine speaks of them by the original implementation's names; a Hugging Face
// folder has others, and this is the one place that knows both.
#pragma once

#include <optional>
#include <string>

#include "absl/strings/string_view.h"

namespace memserve::engine {

class TensorNames {
 public:
  enum class Style { kOriginal, kHuggingFace };
  TensorNames() = default;
  explicit TensorNames(Style style) : style_(style) {}

  // The name in the checkpoint of the tensor that the engine calls `ours`.
  std::string Stored(absl::string_view ours) const;

  // For a tensor of the checkpoint that the model of this configuration has no use for: the key of config.json that says otherwise,
  // where it is one that models of this family can have. Absent: an unrelated tensor.
  std::optional<std::string> ContradictedKey(absl::string_view stored, int n_layers) const;

 private:
  Style style_ = Style::kOriginal;
};

}  // namespace memserve::engine
