#include "engine/request_builder.h"

#include <sys/random.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/model/load_macros.h"
#include "engine/output_stream.h"
#include "engine/tokenizer/tokenizer.h"
#include "engine/validate.h"

namespace memserve::engine {

uint64_t RandomBits() {
  uint64_t bits = 0;
  while (getrandom(&bits, sizeof(bits), 0) != sizeof(bits)) {
  }
  return bits;
}

absl::StatusOr<std::vector<int32_t>> RequestBuilder::TokensOf(const Prompt& prompt, std::optional<bool> add_bos,
                                                              bool allow_special) const {
  if (const auto* ids = std::get_if<std::vector<int32_t>>(&prompt)) return *ids;
  std::vector<int32_t> ids;
  if (const auto* chat = std::get_if<Chat>(&prompt)) {
    LOAD_OR_RETURN(RenderedChat rendered, (*context_.chat_template)->Render(*chat));
    const EncodeOptions options = {.allow_special = true, .literal = std::move(rendered.from_messages)};
    LOAD_OR_RETURN(ids, context_.tokenizer->Encode(rendered.text, options));
    if (!add_bos.value_or(false)) return ids;  // templates write it themselves
  } else {
    LOAD_OR_RETURN(ids, context_.tokenizer->Encode(std::get<std::string>(prompt), {.allow_special = allow_special}));
    if (!add_bos.value_or(context_.tokenizer->adds_bos())) return ids;
  }
  if (context_.info.bos_token_id) ids.insert(ids.begin(), *context_.info.bos_token_id);
  return ids;
}

// Context and continuation together. Two texts are encoded as one, as they would stand in a document, and what follows the first
// context.size() tokens is scored: encoded by itself, a continuation might begin with a space of its own (SentencePiece).
absl::StatusOr<std::vector<int32_t>> RequestBuilder::TokensWithContinuation(const ScoreRequest& request,
                                                                            const std::vector<int32_t>& context,
                                                                            const Prompt& continuation) const {
  const auto* before = std::get_if<std::string>(&request.context);
  const auto* after = std::get_if<std::string>(&continuation);
  if (before != nullptr && after != nullptr) return TokensOf(Prompt(*before + *after), request.add_bos, false);
  std::vector<int32_t> tokens = context;
  LOAD_OR_RETURN(const std::vector<int32_t> more, TokensOf(continuation, /*add_bos=*/false, /*allow_special=*/false));
  tokens.insert(tokens.end(), more.begin(), more.end());
  return tokens;
}

absl::Status RequestBuilder::CheckFits(const Sequence& sequence) const {
  const int64_t pages = (sequence.most_tokens() + context_.kv_page_size - 1) / context_.kv_page_size;
  if (pages <= context_.kv_pages) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("prompt: with what follows it comes to ", sequence.most_tokens(), " tokens, ",
                                                 pages, " pages; the KV cache has ", context_.kv_pages));
}

// What keys and values depend on beside the tokens, and whose they are. A request that keeps out of the cache has a root of its
// own: its own sequences still share their prompt.
std::shared_ptr<const std::string> RequestBuilder::ChainRoot(const SchedulingParams& scheduling, const SequenceMemory& memory,
                                                             const std::string& id) const {
  if (!scheduling.prefix_cache)
    return std::make_shared<const std::string>(absl::StrCat("request ", id, " ", absl::Hex(RandomBits())));
  return std::make_shared<const std::string>(absl::StrCat(memory.Key(), " salt ", scheduling.cache_salt));
}

// The prompt as it runs: tokenised, then cut from the left where the request says so. A begin-of-sequence token stays.
absl::StatusOr<std::vector<int32_t>> RequestBuilder::PromptOf(const GenerateRequest& request) const {
  LOAD_OR_RETURN(std::vector<int32_t> tokens, TokensOf(request.prompt, request.add_bos, request.allow_special));
  if (request.truncate_prompt && static_cast<int64_t>(tokens.size()) > *request.truncate_prompt) {
    const bool has_bos = context_.info.bos_token_id && tokens.front() == *context_.info.bos_token_id;
    tokens.erase(tokens.begin() + (has_bos ? 1 : 0), tokens.end() - *request.truncate_prompt + (has_bos ? 1 : 0));
  }
  if (absl::Status status = ValidatePromptLength(static_cast<int64_t>(tokens.size()), context_.info.max_context_tokens);
      !status.ok()) {
    return status;
  }
  return tokens;
}

std::vector<int32_t> RequestBuilder::StopIdsOf(const GenerateRequest& request) const {
  std::vector<int32_t> ids;
  if (!request.stop.ignore_eos) {
    ids = context_.info.eos_token_ids;
    // What ends a turn, where generation_config.json names other tokens alone.
    if (std::holds_alternative<Chat>(request.prompt)) {
      for (const std::optional<int32_t> id : {context_.tokenizer->eos_id(), context_.tokenizer->end_of_turn_id()}) {
        if (id) ids.push_back(*id);
      }
    }
  }
  ids.insert(ids.end(), request.stop.token_ids.begin(), request.stop.token_ids.end());
  return ids;
}

// A word as it is encoded at the beginning of a text, and after a space.
absl::StatusOr<std::vector<std::vector<int32_t>>> RequestBuilder::TokensOfBadWords(const std::vector<std::string>& words) const {
  std::vector<std::vector<int32_t>> all;
  for (const std::string& word : words) {
    for (const std::string& text : {word, absl::StrCat(" ", word)}) {
      LOAD_OR_RETURN(std::vector<int32_t> tokens, context_.tokenizer->Encode(text));
      if (!tokens.empty() && std::find(all.begin(), all.end(), tokens) == all.end()) all.push_back(std::move(tokens));
    }
  }
  return all;
}

absl::Status GrammarTooSlow(const std::string& field, absl::Duration limit) {
  return absl::InvalidArgumentError(absl::StrCat(field, ": finding out what may come next took more than ",
                                                 absl::FormatDuration(limit), " for one token (--grammar_mask_timeout_ms)"));
}

absl::StatusOr<LogitRules::GrammarRules> RequestBuilder::GrammarRulesOf(const Grammar& grammar, const Sequence& sequence) const {
  const Tokenizer& tokenizer = *context_.tokenizer;
  LogitRules::GrammarRules rules = {.matcher = grammar.NewMatcher()};
  if (rules.matcher == nullptr) return absl::InternalError("structured: no matcher for this grammar");
  const std::vector<int32_t>& eos = context_.info.eos_token_ids;
  for (const int32_t id : sequence.stop_ids) {
    if (tokenizer.TokenBytes(id).empty() || std::find(eos.begin(), eos.end(), id) != eos.end()) rules.end_ids.push_back(id);
  }
  // Where no text stands before it, a token may give other text than elsewhere.
  const bool nothing_before = sequence.prompt_tokens == 1 && tokenizer.IsSpecial(sequence.tokens[0]);
  for (int32_t id = 0; nothing_before && id < std::min(context_.config.vocab_size, tokenizer.vocab_size()); ++id) {
    bool still_first = false;
    if (tokenizer.FirstTokenBytes(id, &still_first) != tokenizer.TokenBytes(id)) rules.not_first.push_back(id);
  }
  return rules;
}

// A request that could draw nothing, or nothing but the end, is none.
absl::Status RequestBuilder::CheckGrammar(Sequence& sequence) const {
  const absl::Duration limit = absl::Milliseconds(context_.options.grammar_mask_timeout_ms);
  const LogitRules::Match match = sequence.rules->MatchOf(sequence.tokens, sequence.prompt_tokens);
  if (sequence.rules->slowest_match() > limit) return GrammarTooSlow(sequence.structured_field, limit);
  switch (match) {
    case LogitRules::Match::kGoesOn:
      return absl::OkStatus();
    case LogitRules::Match::kComplete:
      return absl::InvalidArgumentError(absl::StrCat(sequence.structured_field, ": nothing but the empty text matches"));
    default:
      return absl::InvalidArgumentError(absl::StrCat(sequence.structured_field, ": no token that may be drawn begins a match"));
  }
}

// One of a request's choices, but for what tells them apart.
absl::StatusOr<std::shared_ptr<Sequence>> RequestBuilder::BuildChoice(const GenerateRequest& request, const Grammar* grammar,
                                                                      std::vector<int32_t> prompt) const {
  auto sequence = std::make_shared<Sequence>();
  Sequence& s = *sequence;
  s.tokens = std::move(prompt);
  s.prompt_tokens = static_cast<int64_t>(s.tokens.size());
  const int64_t room =
      std::min<int64_t>(context_.info.max_context_tokens, context_.kv_pages * context_.kv_page_size + 1) - s.prompt_tokens;
  const int64_t wanted =
      request.stop.max_tokens.value_or(context_.generation.max_new_tokens.value_or(context_.info.max_context_tokens));
  s.max_draws = std::max<int64_t>(1, std::min(wanted, room));
  s.stop_ids = StopIdsOf(request);
  s.temperature = request.sampling.temperature.value_or(context_.generation.temperature.value_or(0.0f));
  s.top_k = request.sampling.top_k.value_or(context_.generation.top_k.value_or(0));
  s.top_p = request.sampling.top_p.value_or(context_.generation.top_p.value_or(1.0f));
  s.memory = Resolve(request.memory, context_.config.memory);
  LOAD_OR_RETURN(std::vector<std::vector<int32_t>> bad_words, TokensOfBadWords(request.sampling.bad_words));
  LogitRules::GrammarRules grammar_rules;
  if (grammar != nullptr) {
    LOAD_OR_RETURN(grammar_rules, GrammarRulesOf(*grammar, s));
  }
  s.rules = LogitRules::New(request.sampling, s.temperature, s.stop_ids, request.stop.min_tokens, std::move(bad_words),
                            context_.config.vocab_size, std::move(grammar_rules));
  if (grammar != nullptr) {
    s.structured_field = FieldOf(*request.structured);
    if (absl::Status status = CheckGrammar(s); !status.ok()) return status;
  }
  s.top_logprobs = request.top_logprobs;
  s.chosen_logprobs = request.logprob_token_ids;
  if (request.speculation) s.drafts = Drafts(*request.speculation);
  s.priority = request.scheduling.priority;
  return sequence;
}

absl::StatusOr<RequestBuilder::Built> RequestBuilder::Build(const GenerateRequest& request, std::shared_ptr<const Grammar> grammar,
                                                            std::shared_ptr<RequestControl> control,
                                                            std::shared_ptr<GenerateListener> listener,
                                                            std::function<void()> on_ended) const {
  LOAD_OR_RETURN(const std::vector<int32_t> prompt, PromptOf(request));
  const int choices = request.best_of.value_or(request.n);
  const uint64_t seed = request.sampling.seed.has_value() ? *request.sampling.seed : RandomBits();
  const auto output = std::make_shared<GenerationOutput>(listener, control, std::move(on_ended), request.n, choices);
  if (request.prompt_logprobs) {
    if (absl::Status status = ValidatePromptLogprobs(static_cast<int64_t>(prompt.size()), *request.prompt_logprobs); !status.ok())
      return status;
  }
  Built built;
  built.new_tokens = static_cast<int64_t>(prompt.size());
  for (int choice = 0; choice < choices; ++choice) {
    LOAD_OR_RETURN(const std::shared_ptr<Sequence> sequence, BuildChoice(request, grammar.get(), prompt));
    Sequence& s = *sequence;
    s.control = control;
    s.seed = seed;
    s.choice = choice;
    if (request.memory_trace) {
      MemoryTraceParams trace = *request.memory_trace;
      if (choice > 0) trace.prompt_tokens = 0;  // the first tells of the prompt for all
      LOAD_OR_RETURN(s.trace, Resolve(trace, context_.config.memory, s.prompt_tokens, s.max_draws,
                                      context_.options.max_trace_entries / choices));
    }
    if (choice > 0) s.leader = built.sequences.front();
    s.chain.root = choice > 0 ? s.leader->chain.root : ChainRoot(request.scheduling, s.memory, control->id);
    if (choice == 0 && request.prompt_logprobs && prompt.size() > 1) {
      s.score_begin = 1;
      s.score_end = s.prompt_tokens;
      s.prompt_top_logprobs = *request.prompt_logprobs;
    }
    if (absl::Status status = CheckFits(s); !status.ok()) return status;
    const bool nothing_before = s.prompt_tokens == 1 && context_.tokenizer != nullptr && context_.tokenizer->IsSpecial(s.tokens[0]);
    s.output = std::make_shared<OutputStream>(OutputOptions{.tokenizer = context_.tokenizer,
                                                            .stop_strings = request.stop.strings,
                                                            .include_stop = request.stop.include_matched,
                                                            .min_tokens = request.stop.min_tokens,
                                                            .logprobs = request.logprobs,
                                                            .token_bytes = request.token_bytes,
                                                            .starts_text = nothing_before,
                                                            .choice = choice,
                                                            .seed = seed,
                                                            .prompt_tokens = static_cast<int32_t>(s.prompt_tokens)},
                                              output);
    built.sequences.push_back(sequence);
  }
  return built;
}

absl::StatusOr<RequestBuilder::Built> RequestBuilder::Build(const ScoreRequest& request, std::shared_ptr<RequestControl> control,
                                                            ScoreCallback callback) const {
  LOAD_OR_RETURN(const std::vector<int32_t> context, TokensOf(request.context, request.add_bos, false));
  if (context.empty()) return absl::InvalidArgumentError("context: has no tokens; at least 1 is needed");
  auto state = std::make_shared<ScoreState>();
  state->callback = std::move(callback);
  state->remaining = static_cast<int>(request.continuations.size());
  state->result.usage.prompt_tokens = static_cast<int32_t>(context.size());
  Built built;
  const SequenceMemory memory = Resolve(request.memory, context_.config.memory);
  const std::shared_ptr<const std::string> root = ChainRoot(request.scheduling, memory, control->id);
  built.new_tokens = static_cast<int64_t>(context.size());
  for (size_t i = 0; i < request.continuations.size(); ++i) {
    auto sequence = std::make_shared<Sequence>();
    Sequence& s = *sequence;
    s.control = control;
    LOAD_OR_RETURN(s.tokens, TokensWithContinuation(request, context, request.continuations[i]));
    if (s.tokens.size() <= context.size()) {
      return absl::InvalidArgumentError(absl::StrCat("continuations[", i, "]: has no tokens; at least 1 is needed"));
    }
    if (static_cast<int64_t>(s.tokens.size()) > context_.info.max_context_tokens) {
      return absl::InvalidArgumentError(absl::StrCat("continuations[", i, "]: with the context it has ", s.tokens.size(),
                                                     " tokens; this server accepts ", context_.info.max_context_tokens));
    }
    s.prompt_tokens = static_cast<int64_t>(s.tokens.size());
    s.memory = memory;
    s.priority = request.scheduling.priority;
    s.chain.root = root;
    if (i > 0) s.leader = built.sequences.front();
    built.new_tokens += s.prompt_tokens - static_cast<int64_t>(context.size());
    s.score_begin = static_cast<int64_t>(context.size());
    s.score_end = s.prompt_tokens;
    s.score_index = static_cast<int>(i);
    s.score = state;
    if (absl::Status status = CheckFits(s); !status.ok()) return status;
    state->result.scores.push_back({.token_ids = {s.tokens.begin() + s.score_begin, s.tokens.end()}});
    state->result.usage.completion_tokens += static_cast<int32_t>(s.tokens.size() - context.size());
    built.sequences.push_back(std::move(sequence));
  }
  return built;
}

}  // namespace memserve::engine
