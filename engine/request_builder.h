// From requests to sequences that are ready to run: tokens, the checkpoint's defaults, limits that depend on both. Nothing here
// changes once it is built: threads may build at once.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/checkpoint_folder.h"
#include "engine/engine.h"
#include "engine/sequence.h"
#include "engine/structured/grammar.h"

namespace memserve::engine {

// What all requests are built with. Everything outlives the builder.
struct RequestContext {
  const EngineOptions& options;
  const ModelConfig& config;
  const GenerationConfig& generation;
  const Tokenizer* tokenizer;  // may be null
  const absl::StatusOr<std::unique_ptr<ChatTemplate>>& chat_template;
  const ModelInfo& info;
  int64_t kv_pages;
  int64_t kv_page_size;
};

class RequestBuilder {
 public:
  explicit RequestBuilder(const RequestContext& context) : context_(context) {}

  // The sequences of one request. They share their prompt: all but the first follow it.
  struct Built {
    std::vector<std::shared_ptr<Sequence>> sequences;
    int64_t new_tokens = 0;  // to be computed before the first token of each is drawn or scored
  };

  // Of a valid request (validate.h). Errors as Engine's. `on_ended` runs before the listener hears the last of it.
  // `grammar` is null where the request asks for none.
  absl::StatusOr<Built> Build(const GenerateRequest& request, std::shared_ptr<const Grammar> grammar,
                              std::shared_ptr<RequestControl> control, std::shared_ptr<GenerateListener> listener,
                              std::function<void()> on_ended) const;
  absl::StatusOr<Built> Build(const ScoreRequest& request, std::shared_ptr<RequestControl> control, ScoreCallback callback) const;

  absl::StatusOr<std::vector<int32_t>> TokensOf(const Prompt& prompt, std::optional<bool> add_bos, bool allow_special) const;

 private:
  absl::StatusOr<std::vector<int32_t>> TokensWithContinuation(const ScoreRequest& request, const std::vector<int32_t>& context,
                                                              const Prompt& continuation) const;
  absl::StatusOr<std::vector<int32_t>> PromptOf(const GenerateRequest& request) const;
  std::vector<int32_t> StopIdsOf(const GenerateRequest& request) const;
  absl::StatusOr<std::vector<std::vector<int32_t>>> TokensOfBadWords(const std::vector<std::string>& words) const;
  absl::StatusOr<std::shared_ptr<Sequence>> BuildChoice(const GenerateRequest& request, const Grammar* grammar,
                                                        std::vector<int32_t> prompt) const;
  absl::StatusOr<LogitRules::GrammarRules> GrammarRulesOf(const Grammar& grammar, const Sequence& sequence) const;
  absl::Status CheckGrammar(Sequence& sequence) const;
  absl::Status CheckFits(const Sequence& sequence) const;
  std::shared_ptr<const std::string> ChainRoot(const SchedulingParams& scheduling, const SequenceMemory& memory,
                                               const std::string& id) const;

  const RequestContext context_;
};

uint64_t RandomBits();

absl::Status GrammarTooSlow(const std::string& field, absl::Duration limit);

}  // namespace memserve::engine
