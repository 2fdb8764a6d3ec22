#include "engine/checkpoint_folder.h"

#include "absl/strings/str_cat.h"
#include "engine/model/folder.h"
#include "engine/model/json.h"
#include "engine/model/load_macros.h"
#include "spdlog/spdlog.h"

namespace memserve::engine {
namespace {

constexpr int64_t kMaxConfigBytes = 4 << 20;
// All that is read beside the tensors.
constexpr const char* kFiles[] = {"config.json",         "generation_config.json", "tokenizer.json",         "tokenizer.model",
                                  "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "added_tokens.json"};

}  // namespace

absl::StatusOr<CheckpointFolder> ReadCheckpointFolder(const std::string& folder) {
  CheckpointFolder read;
  if (folder.empty()) return absl::InvalidArgumentError("checkpoint: no folder was given");
  for (const char* name : kFiles) {
    if (absl::Status s = CheckLink(absl::StrCat(folder, "/", name)); !s.ok()) return s;
  }
  const std::string config = absl::StrCat(folder, "/config.json");
  LOAD_OR_RETURN(const std::string text, ReadFile(config, kMaxConfigBytes));
  LOAD_OR_RETURN(read.model, ParseModelConfig(text, config));
  const std::string generation = absl::StrCat(folder, "/generation_config.json");
  absl::StatusOr<std::string> generation_text = ReadFile(generation, kMaxConfigBytes);
  if (generation_text.ok()) {
    LOAD_OR_RETURN(read.generation, ParseGenerationConfig(*generation_text, generation));
  } else if (!absl::IsNotFound(generation_text.status())) {
    return generation_text.status();
  }
  if (read.generation.eos_token_ids.empty()) read.generation.eos_token_ids = read.model.eos_token_ids;
  if (!read.generation.bos_token_id) read.generation.bos_token_id = read.model.bos_token_id;
  LOAD_OR_RETURN(read.tensors, Checkpoint::Open(folder));
  LOAD_OR_RETURN(read.tokenizer, LoadTokenizer(folder, read.model.tokenizer, read.model.vocab_size));
  read.chat_template = absl::UnimplementedError("chat: the checkpoint has no tokenizer; send token ids");
  if (read.tokenizer != nullptr) read.chat_template = ChatTemplate::Load(folder, *read.tokenizer);
  // A template that cannot be used leaves the rest to be served.
  if (const absl::Status status = read.chat_template.status(); absl::IsNotFound(status)) {
    read.chat_template = absl::UnimplementedError("chat: the checkpoint has no chat template; send a text");
  } else if (absl::IsInvalidArgument(status)) {
    spdlog::warn("no chats are served: {}", std::string(status.message()));
    read.chat_template = absl::UnimplementedError(absl::StrCat("chat: the template cannot be used: ", status.message()));
  }
  return read;
}

}  // namespace memserve::engine
