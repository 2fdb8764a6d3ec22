#include "engine/validate.h"

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/structured/grammar.h"
#include "engine/tokenizer/utf8.h"

namespace memserve::engine {
namespace {

absl::Status Bad(absl::string_view field, absl::string_view message) {
  return absl::InvalidArgumentError(absl::StrCat(field, ": ", message));
}

absl::Status CheckId(const std::string& id) {
  if (id.size() <= kMaxIdBytes) return absl::OkStatus();
  return Bad("request_id", absl::StrCat("has ", id.size(), " bytes; at most ", kMaxIdBytes, " are accepted"));
}

absl::Status CheckIds(absl::string_view field, const std::vector<int32_t>& ids, int vocab_size) {
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= vocab_size) {
      return Bad(field, absl::StrCat("id ", ids[i], " at index ", i, " is not in [0, ", vocab_size, ")"));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckChat(absl::string_view field, const Chat& chat, const RequestLimits& limits) {
  if (!limits.chat_template.ok()) return limits.chat_template;
  if (chat.messages.empty() || chat.messages.size() > kMaxMessages) {
    return Bad(field, absl::StrCat("has ", chat.messages.size(), " messages; 1 to ", kMaxMessages, " are accepted"));
  }
  size_t bytes = 0;
  for (size_t i = 0; i < chat.messages.size(); ++i) {
    const ChatMessage& message = chat.messages[i];
    const std::string place = absl::StrCat(field, ".messages[", i, "]");
    if (message.role.empty() || message.role.size() > kMaxRoleBytes) {
      return Bad(place, absl::StrCat("has a role of ", message.role.size(), " bytes; 1 to ", kMaxRoleBytes, " are accepted"));
    }
    for (const std::string* text : {&message.role, &message.content}) {
      if (FindBrokenUtf8(*text) != std::string::npos) return Bad(place, "is not UTF-8");
    }
    bytes += message.content.size();
  }
  if (static_cast<int64_t>(bytes) <= limits.max_prompt_bytes) return absl::OkStatus();
  return Bad(field, absl::StrCat("has ", bytes, " bytes of messages; this server accepts ", limits.max_prompt_bytes));
}

absl::Status CheckPrompt(absl::string_view field, const Prompt& prompt, const RequestLimits& limits) {
  if (const auto* text = std::get_if<std::string>(&prompt)) {
    if (!limits.has_tokenizer) {
      return absl::UnimplementedError(absl::StrCat(field, ": the checkpoint has no tokenizer; send token ids"));
    }
    if (static_cast<int64_t>(text->size()) > limits.max_prompt_bytes) {
      return Bad(field, absl::StrCat("has ", text->size(), " bytes; this server accepts ", limits.max_prompt_bytes));
    }
    return absl::OkStatus();
  }
  if (const auto* chat = std::get_if<Chat>(&prompt)) return CheckChat(field, *chat, limits);
  const auto& ids = std::get<std::vector<int32_t>>(prompt);
  if (static_cast<int64_t>(ids.size()) > limits.max_context_tokens) {
    return Bad(field, absl::StrCat("has ", ids.size(), " tokens; this server accepts ", limits.max_context_tokens - 1));
  }
  return CheckIds(field, ids, limits.vocab_size);
}

// NaN is in no range.
absl::Status CheckNumber(absl::string_view field, std::optional<float> value, float low, float high, bool with_low = true) {
  if (!value || (with_low ? *value >= low : *value > low)) {
    if (!value || *value <= high) return absl::OkStatus();
  }
  return Bad(field, absl::StrCat(*value, " is not in ", with_low ? "[" : "(", low, ", ", high, "]"));
}

absl::Status CheckLogitChanges(const SamplingParams& sampling, const RequestLimits& limits) {
  for (const absl::Status& status : {CheckNumber("min_p", sampling.min_p, 0, 1), CheckNumber("typical_p", sampling.typical_p, 0, 1, false),
                                     CheckNumber("repetition_penalty", sampling.repetition_penalty, 0, 100, false),
                                     CheckNumber("presence_penalty", sampling.presence_penalty, -100, 100),
                                     CheckNumber("frequency_penalty", sampling.frequency_penalty, -100, 100)}) {
    if (!status.ok()) return status;
  }
  if (sampling.penalty_window < 0) return Bad("penalty_window", absl::StrCat(sampling.penalty_window, " is not at least 0"));
  if (static_cast<int64_t>(sampling.logit_bias.size()) > kMaxBiasedTokens) {
    return Bad("logit_bias", absl::StrCat("has ", sampling.logit_bias.size(), " tokens; at most ", kMaxBiasedTokens, " are accepted"));
  }
  std::vector<int32_t> biased;
  for (const auto& [token, value] : sampling.logit_bias) {
    biased.push_back(token);
    if (absl::Status s = CheckNumber(absl::StrCat("logit_bias[", token, "]"), value, -1000, 1000); !s.ok()) return s;
  }
  if (static_cast<int64_t>(sampling.banned_token_ids.size()) > kMaxBiasedTokens) {
    return Bad("banned_token_ids",
               absl::StrCat("has ", sampling.banned_token_ids.size(), " ids; at most ", kMaxBiasedTokens, " are accepted"));
  }
  if (sampling.allowed_token_ids.size() > static_cast<size_t>(limits.vocab_size)) {
    return Bad("allowed_token_ids",
               absl::StrCat("has ", sampling.allowed_token_ids.size(), " ids; the vocabulary has ", limits.vocab_size));
  }
  for (const absl::Status& status :
       {CheckIds("logit_bias", biased, limits.vocab_size), CheckIds("banned_token_ids", sampling.banned_token_ids, limits.vocab_size),
        CheckIds("allowed_token_ids", sampling.allowed_token_ids, limits.vocab_size)}) {
    if (!status.ok()) return status;
  }
  if (sampling.allowed_token_ids.empty()) return absl::OkStatus();
  for (int32_t id : sampling.allowed_token_ids) {
    const auto& banned = sampling.banned_token_ids;
    if (std::find(banned.begin(), banned.end(), id) == banned.end()) return absl::OkStatus();
  }
  return Bad("allowed_token_ids", "all of them are banned: there is nothing to draw");
}

absl::Status CheckSampling(const SamplingParams& sampling) {
  if (sampling.temperature && !(*sampling.temperature >= 0 && *sampling.temperature <= 100)) {
    return Bad("temperature", absl::StrCat(*sampling.temperature, " is not in [0, 100]"));
  }
  if (sampling.top_k && *sampling.top_k < 0) return Bad("top_k", absl::StrCat(*sampling.top_k, " is not at least 0"));
  if (sampling.top_p && !(*sampling.top_p > 0 && *sampling.top_p <= 1)) {
    return Bad("top_p", absl::StrCat(*sampling.top_p, " is not in (0, 1]"));
  }
  return absl::OkStatus();
}

absl::Status CheckStop(const StopParams& stop, const RequestLimits& limits) {
  if (stop.max_tokens && *stop.max_tokens < 1) return Bad("max_tokens", absl::StrCat(*stop.max_tokens, " is not at least 1"));
  const int32_t most = stop.max_tokens.value_or(limits.max_context_tokens);
  if (stop.min_tokens < 0 || stop.min_tokens > most) return Bad("min_tokens", absl::StrCat(stop.min_tokens, " is not in [0, ", most, "]"));
  if (stop.strings.size() > kMaxStopStrings) {
    return Bad("stop.strings", absl::StrCat("has ", stop.strings.size(), " strings; at most ", kMaxStopStrings, " are accepted"));
  }
  for (size_t i = 0; i < stop.strings.size(); ++i) {
    if (stop.strings[i].empty() || stop.strings[i].size() > kMaxStopStringBytes) {
      return Bad("stop.strings", absl::StrCat("string ", i, " has ", stop.strings[i].size(), " bytes; 1 to ", kMaxStopStringBytes,
                                              " are accepted"));
    }
  }
  if (!stop.strings.empty() && !limits.has_tokenizer) {
    return absl::UnimplementedError("stop.strings: the checkpoint has no tokenizer; use stop.token_ids");
  }
  if (stop.token_ids.size() > kMaxStopTokenIds) {
    return Bad("stop.token_ids", absl::StrCat("has ", stop.token_ids.size(), " ids; at most ", kMaxStopTokenIds, " are accepted"));
  }
  return CheckIds("stop.token_ids", stop.token_ids, limits.vocab_size);
}

absl::Status CheckInt(absl::string_view field, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return Bad(field, absl::StrCat(value, " is not in [", low, ", ", high, "]"));
}

absl::Status CheckBadWords(const std::vector<std::string>& words, const RequestLimits& limits) {
  if (static_cast<int64_t>(words.size()) > kMaxBadWords) {
    return Bad("bad_words", absl::StrCat("has ", words.size(), " words; at most ", kMaxBadWords, " are accepted"));
  }
  for (size_t i = 0; i < words.size(); ++i) {
    if (words[i].empty() || words[i].size() > kMaxBadWordBytes) {
      return Bad("bad_words",
                 absl::StrCat("word ", i, " has ", words[i].size(), " bytes; 1 to ", kMaxBadWordBytes, " are accepted"));
    }
    if (FindBrokenUtf8(words[i]) != std::string::npos) return Bad("bad_words", absl::StrCat("word ", i, " is not UTF-8"));
  }
  if (words.empty() || limits.has_tokenizer) return absl::OkStatus();
  return absl::UnimplementedError("bad_words: the checkpoint has no tokenizer; use banned_token_ids");
}

absl::Status CheckChoices(const GenerateRequest& request) {
  if (absl::Status s = CheckInt("n", request.n, 1, kMaxChoices); !s.ok()) return s;
  if (!request.best_of) return absl::OkStatus();
  return CheckInt("best_of", *request.best_of, request.n, kMaxChoices);
}

absl::Status CheckSpeculation(const SpeculationParams& speculation) {
  for (const absl::Status& status :
       {CheckInt("speculation.max_draft_tokens", speculation.max_draft_tokens, 1, kMaxDraftTokens),
        CheckInt("speculation.min_ngram", speculation.min_ngram, 1, kMaxDraftTokens),
        CheckInt("speculation.max_ngram", speculation.max_ngram, speculation.min_ngram, kMaxDraftTokens)}) {
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status CheckLogprobs(const GenerateRequest& request, const RequestLimits& limits) {
  const int64_t most = std::min<int64_t>(kMaxTopLogprobs, limits.vocab_size);
  if (absl::Status s = CheckInt("top_logprobs", request.top_logprobs, 0, most); !s.ok()) return s;
  if (absl::Status s = CheckInt("prompt_logprobs", request.prompt_logprobs.value_or(0), 0, most); !s.ok()) return s;
  if (static_cast<int64_t>(request.logprob_token_ids.size()) > kMaxChosenLogprobs) {
    return Bad("logprob_token_ids",
               absl::StrCat("has ", request.logprob_token_ids.size(), " ids; at most ", kMaxChosenLogprobs, " are accepted"));
  }
  return CheckIds("logprob_token_ids", request.logprob_token_ids, limits.vocab_size);
}

absl::Status CheckScheduling(const SchedulingParams& scheduling) {
  if (scheduling.priority < -kMaxPriority || scheduling.priority > kMaxPriority) {
    return Bad("scheduling.priority", absl::StrCat(scheduling.priority, " is not in [", -kMaxPriority, ", ", kMaxPriority, "]"));
  }
  if (scheduling.cache_salt.size() > kMaxSaltBytes) {
    return Bad("scheduling.cache_salt",
               absl::StrCat("has ", scheduling.cache_salt.size(), " bytes; at most ", kMaxSaltBytes, " are accepted"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status Validate(const GenerateRequest& request, const RequestLimits& limits) {
  for (const absl::Status& status :
       {CheckId(request.id), CheckPrompt("prompt", request.prompt, limits), CheckSampling(request.sampling),
        CheckLogitChanges(request.sampling, limits), CheckStop(request.stop, limits), CheckScheduling(request.scheduling),
        Validate(request.memory, limits.memory), CheckLogprobs(request, limits), CheckChoices(request),
        CheckBadWords(request.sampling.bad_words, limits)}) {
    if (!status.ok()) return status;
  }
  if (request.truncate_prompt && *request.truncate_prompt < 1) {
    return Bad("truncate_prompt", absl::StrCat(*request.truncate_prompt, " is not at least 1"));
  }
  if (request.speculation) {
    if (absl::Status s = CheckSpeculation(*request.speculation); !s.ok()) return s;
  }
  if (request.memory_trace) {
    if (absl::Status s = Validate(*request.memory_trace, limits.memory); !s.ok()) return s;
  }
  if (request.structured) {
    if (!StructuredOutputIsBuilt()) return absl::UnimplementedError("structured: this server was built without structured output");
    if (!limits.has_tokenizer) return absl::UnimplementedError("structured: the checkpoint has no tokenizer");
    if (absl::Status s = Validate(*request.structured); !s.ok()) return s;
  }
  return absl::OkStatus();
}

absl::Status Validate(const ScoreRequest& request, const RequestLimits& limits) {
  if (absl::Status s = CheckId(request.id); !s.ok()) return s;
  if (absl::Status s = CheckPrompt("context", request.context, limits); !s.ok()) return s;
  if (absl::Status s = CheckScheduling(request.scheduling); !s.ok()) return s;
  if (absl::Status s = Validate(request.memory, limits.memory); !s.ok()) return s;
  if (request.continuations.empty() || request.continuations.size() > kMaxContinuations) {
    return Bad("continuations", absl::StrCat("has ", request.continuations.size(), " entries; 1 to ", kMaxContinuations, " are accepted"));
  }
  for (size_t i = 0; i < request.continuations.size(); ++i) {
    const std::string field = absl::StrCat("continuations[", i, "]");
    if (std::holds_alternative<Chat>(request.continuations[i])) return Bad(field, "is a chat; it must be a text or token ids");
    if (absl::Status s = CheckPrompt(field, request.continuations[i], limits); !s.ok()) return s;
  }
  return absl::OkStatus();
}

absl::Status ValidatePromptLogprobs(int64_t tokens, int32_t top) {
  const int64_t entries = tokens * (1 + top);
  if (entries <= kMaxPromptLogprobs) return absl::OkStatus();
  return Bad("prompt_logprobs", absl::StrCat(top, " beside each of ", tokens, " tokens make ", entries, " entries; at most ",
                                             kMaxPromptLogprobs, " are accepted"));
}

absl::Status ValidatePromptLength(int64_t tokens, int max_context_tokens) {
  if (tokens == 0) return Bad("prompt", "has no tokens; at least 1 is needed");
  if (tokens < max_context_tokens) return absl::OkStatus();
  return Bad("prompt", absl::StrCat("has ", tokens, " tokens; this server accepts ", max_context_tokens - 1, " (context of ",
                                    max_context_tokens, ", and at least 1 to draw)"));
}

}  // namespace memserve::engine
