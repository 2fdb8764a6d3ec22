// A checkpoint folder read as far as it can be without its weights: configuration, sampling defaults, tensor headers, tokenizer.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "engine/chat_template.h"
#include "engine/model/checkpoint.h"
#include "engine/model/config.h"
#include "engine/tokenizer/tokenizer.h"

namespace memserve::engine {

struct CheckpointFolder {
  ModelConfig model;
  GenerationConfig generation;
  std::unique_ptr<Checkpoint> tensors;
  std::unique_ptr<Tokenizer> tokenizer;  // null: none
  absl::StatusOr<std::unique_ptr<ChatTemplate>> chat_template;  // UNIMPLEMENTED: why there is none
};

// INVALID_ARGUMENT, NOT_FOUND, DATA_LOSS: one line with file, thing, expected and found.
absl::StatusOr<CheckpointFolder> ReadCheckpointFolder(const std::string& folder);

}  // namespace memserve::engine
