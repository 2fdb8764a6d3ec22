// What is asked of the engine, and what it answers.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace memserve::engine {

struct ChatMessage {
  std::string role;
  std::string content;
};

// Written out by the checkpoint's chat template. Special tokens come from the template alone, never from a message.
struct Chat {
  std::vector<ChatMessage> messages;  // at least 1
  bool add_generation_prompt = true;  // end where the assistant is to go on
};

// Text is tokenised by the engine; token ids are taken as they are. As what follows a context, a chat means nothing.
using Prompt = std::variant<std::string, std::vector<int32_t>, Chat>;

// Unset: the checkpoint's generation_config.json, then greedy.
struct SamplingParams {
  std::optional<float> temperature;  // [0, 100], 0 is greedy
  std::optional<int32_t> top_k;      // >= 0, 0: all
  std::optional<float> top_p;        // (0, 1]
  std::optional<uint64_t> seed;      // drawn when unset, and returned
  // What follows changes the logits first: see kernels/logit_adjustment.h.
  std::optional<float> min_p;               // [0, 1]; 0: off
  std::optional<float> typical_p;           // (0, 1]; 1: off
  std::optional<float> repetition_penalty;  // (0, 100]; 1: off
  float presence_penalty = 0;               // [-100, 100]
  float frequency_penalty = 0;              // [-100, 100]
  int32_t penalty_window = 0;               // penalties look at so many tokens before; 0: at all
  std::vector<std::pair<int32_t, float>> logit_bias;  // at most 1024 tokens, each once; [-1000, 1000]
  std::vector<int32_t> allowed_token_ids;   // no others are drawn; empty: all
  std::vector<int32_t> banned_token_ids;    // at most 1024
  std::vector<std::string> bad_words;       // at most 128 of 1 … 256 bytes: never drawn as the tokens that spell them
};

struct StopParams {
  std::optional<int32_t> max_tokens;   // >= 1; unset: the checkpoint's, else what fits the context
  std::vector<std::string> strings;    // at most 16 of 1 … 256 bytes
  std::vector<int32_t> token_ids;      // at most 64
  bool ignore_eos = false;
  bool include_matched = false;        // the text of what matched is given too
  int32_t min_tokens = 0;              // before so many are drawn nothing that stops is drawn or matched; at most max_tokens
};

// What the generated text must look like, to its end: a prefix of it is what there is when it ends for another reason.
struct StructuredOutput {
  enum class Kind : char { kJson, kJsonSchema, kRegex, kGrammar, kChoice };
  Kind kind = Kind::kJson;
  std::string text;                  // schema, regular expression or grammar; at most 64 KiB
  std::vector<std::string> choices;  // at most 1024, of 64 KiB together
};

// What the memory layers do for one sequence.
struct MemoryMode {
  bool enabled = true;               // off: they add nothing to the residual stream
  std::optional<int32_t> knn;        // [1, mem_knn]: so many rows for each memory head; unset: mem_knn
  std::vector<int32_t> layers;       // of the model, whose memory is on; empty: all that have one
  std::vector<int32_t> masked_rows;  // at most 1024: left out of the sums of all layers, the other weights stay as they are
};

// Which reads of the value tables are told. Those of a token are the ones of the forward pass that it was drawn from.
struct MemoryTraceParams {
  std::optional<int32_t> tokens;   // >= 0: of the first so many that are drawn; unset: of all, as far as the server's limit goes
  int32_t prompt_tokens = 0;       // >= 0: and of the last so many positions of the prompt
  std::optional<int32_t> entries;  // [1, mem_knn]: of each memory head, largest weights first; unset: all
  std::vector<int32_t> layers;     // of the model; empty: all that have memory
};

// Guesses at what follows, verified as they are computed. The answer is the same without.
struct SpeculationParams {
  int32_t max_draft_tokens = 8;  // [1, 16], in one step
  int32_t min_ngram = 2;         // [1, 16]: so many tokens at least, and
  int32_t max_ngram = 4;         // [min_ngram, 16] at most must have been seen before
};

// Where a request stands among the others.
struct SchedulingParams {
  int32_t priority = 0;      // [-1000, 1000]; higher goes first, and may take pages from lower ones that run
  bool prefix_cache = true;  // off: neither takes from the prefix cache nor leaves anything that others could find
  std::string cache_salt;    // prefixes are found only under the same salt; at most 256 bytes
};

struct GenerateRequest {
  std::string id;  // unique among running requests; empty: drawn
  Prompt prompt;
  std::optional<bool> add_bos;  // unset: before a text, where the tokenizer puts one; before a chat, what its template writes
  bool allow_special = false;   // names of special tokens in a text give these tokens
  std::optional<int32_t>
      truncate_prompt;  // >= 1: of a longer prompt the last so many tokens, a begin-of-sequence token in front counted
  int32_t n = 1;        // choices that are given, [1, 128]
  std::optional<int32_t>
      best_of;  // choices that are drawn, [n, 128]; the n of the largest mean logprob are given, best first. Unset: n
  SamplingParams sampling;
  StopParams stop;
  MemoryMode memory;
  bool logprobs = false;
  int32_t top_logprobs = 0;  // beside each token so many of the likeliest; at most 20
  std::vector<int32_t> logprob_token_ids;  // beside each token the logprobs of these; at most 64
  std::optional<int32_t> prompt_logprobs;  // the prompt's too, and beside each so many of the likeliest; at most 20
  bool echo = false;                       // the prompt's tokens and text
  bool token_bytes = false;
  std::optional<SpeculationParams> speculation;  // unset: none
  std::optional<MemoryTraceParams> memory_trace;
  std::optional<StructuredOutput> structured;
  SchedulingParams scheduling;
  absl::Time deadline = absl::InfiniteFuture();
};

struct ScoreRequest {
  std::string id;
  Prompt context;
  std::optional<bool> add_bos;
  std::vector<Prompt> continuations;  // at most 256
  MemoryMode memory;
  SchedulingParams scheduling;
  absl::Time deadline = absl::InfiniteFuture();
};

struct TokenLogprob {
  int32_t token_id = 0;
  float logprob = 0;
};

// The rows that a token read in one memory layer: one entry for each read, by head, largest weight first.
struct LayerTrace {
  int32_t layer = 0;  // of the model
  std::vector<int32_t> heads;
  std::vector<int32_t> rows;
  std::vector<float> weights;
};

// Of the forward pass that ran the token at `position`: the next token was drawn from it.
struct TokenTrace {
  int32_t position = 0;
  int32_t token_id = 0;
  std::vector<LayerTrace> layers;
};

// A part of the prompt: its tokens and text (echo), or the log-probabilities of tokens, given those before them.
struct PromptDelta {
  int32_t first = 0;  // position of the first of token_ids
  std::vector<int32_t> token_ids;
  std::string text;                                     // echo
  std::vector<std::string> token_bytes;                 // echo: beside token_ids, if asked for
  std::vector<float> logprobs;                          // beside token_ids
  std::vector<std::vector<TokenLogprob>> top_logprobs;  // beside token_ids, if asked for: likeliest first
};

struct Delta {
  int32_t choice = 0;  // of a request's n
  std::string text;  // whole UTF-8 characters; may be empty while text is held back
  std::vector<int32_t> token_ids;
  std::vector<float> logprobs;           // beside token_ids, if asked for
  std::vector<std::string> token_bytes;  // beside token_ids, if asked for
  std::vector<std::vector<TokenLogprob>> top_logprobs;  // beside token_ids, if asked for: likeliest first
  std::vector<std::vector<float>> chosen_logprobs;      // beside token_ids, if asked for: of each of logprob_token_ids
  std::vector<TokenTrace> memory_traces;                // if asked for: up to the pass that the last of token_ids was drawn from
};

enum class FinishReason { kStop, kLength };

struct Usage {
  int32_t prompt_tokens = 0;
  int32_t cached_tokens = 0;
  int32_t completion_tokens = 0;      // of this choice
  int32_t all_completion_tokens = 0;  // of all that were drawn, those not given included; 0 but for the last choice
  int32_t draft_tokens = 0;           // guessed
  int32_t accepted_draft_tokens = 0;  // of these, drawn
};

struct Timings {
  absl::Duration queue;
  absl::Duration prefill;
  absl::Duration decode;
};

// The end of one choice.
struct Finished {
  int32_t choice = 0;
  bool last = true;  // no other choice goes on
  FinishReason reason = FinishReason::kStop;
  std::string text;  // held back until now
  std::optional<std::string> stop_string;
  std::optional<int32_t> stop_token_id;
  Usage usage;
  Timings timings;
  uint64_t seed = 0;
};

// Hears one generation. Calls come one after the other, from one of the engine's threads, and must not block. OnFinished ends a
// choice, or with an error all of them; the one that says so is the last.
class GenerateListener {
 public:
  virtual ~GenerateListener() = default;
  virtual void OnPrompt(PromptDelta) {}  // before the first delta
  virtual void OnDelta(Delta delta) = 0;
  virtual void OnFinished(absl::StatusOr<Finished> finished) = 0;
};

struct ContinuationScore {
  double logprob = 0.0;  // sum over its tokens
  bool is_greedy = true;
  std::vector<int32_t> token_ids;
  std::vector<float> token_logprobs;
};

struct ScoreResult {
  std::vector<ContinuationScore> scores;  // in the order of the request
  Usage usage;
};

using ScoreCallback = std::function<void(absl::StatusOr<ScoreResult>)>;

}  // namespace memserve::engine
