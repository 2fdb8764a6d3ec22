#include "server/convert.h"

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "absl/random/random.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "engine/retry_after.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "grpcpp/support/error_details.h"

#define RETURN_IF_ERROR(expression) \
  if (absl::Status status_ = (expression); !status_.ok()) return status_

namespace memserve::server {
namespace {

// Where the engine gives no time of its own: a slow reader may come back at once, with its whole request.
constexpr absl::Duration kRetryAfter = absl::Seconds(1);

absl::Status Missing(absl::string_view field, absl::string_view limit) {
  return absl::InvalidArgumentError(absl::StrCat(field, " is not set; it must be ", limit));
}

absl::Status CheckModelName(const auto& request, const engine::ModelInfo& model) {
  if (!request.has_model() || request.model() == model.name) return absl::OkStatus();
  return absl::NotFoundError(absl::StrCat("model is \"", request.model(), "\"; this server has \"", model.name, "\""));
}

std::string DrawRequestId() {
  thread_local absl::BitGen random;
  return absl::StrFormat("%016x%016x", absl::Uniform<uint64_t>(random), absl::Uniform<uint64_t>(random));
}

std::string RequestId(const auto& request) { return request.request_id().empty() ? DrawRequestId() : request.request_id(); }

// `message` has a oneof of text and tokens, which is set.
engine::Prompt ToPrompt(const auto& message) {
  if (message.has_text()) return message.text();
  return std::vector<int32_t>(message.tokens().ids().begin(), message.tokens().ids().end());
}

engine::Chat ToChat(const v1::Chat& message) {
  engine::Chat chat;
  for (const v1::ChatMessage& one : message.messages()) chat.messages.push_back({.role = one.role(), .content = one.content()});
  chat.add_generation_prompt = !message.has_add_generation_prompt() || message.add_generation_prompt();
  return chat;
}

engine::SamplingParams ToSampling(const v1::SamplingParams& params) {
  engine::SamplingParams sampling;
  if (params.has_temperature()) sampling.temperature = params.temperature();
  if (params.has_top_k()) sampling.top_k = params.top_k();
  if (params.has_top_p()) sampling.top_p = params.top_p();
  if (params.has_seed()) sampling.seed = params.seed();
  if (params.has_repetition_penalty()) sampling.repetition_penalty = params.repetition_penalty();
  sampling.frequency_penalty = params.frequency_penalty();
  sampling.presence_penalty = params.presence_penalty();
  sampling.penalty_window = params.penalty_window();
  sampling.logit_bias.assign(params.logit_bias().begin(), params.logit_bias().end());
  // A map has no order of its own.
  std::sort(sampling.logit_bias.begin(), sampling.logit_bias.end());
  sampling.banned_token_ids.assign(params.banned_token_ids().begin(), params.banned_token_ids().end());
  sampling.allowed_token_ids.assign(params.allowed_token_ids().begin(), params.allowed_token_ids().end());
  if (params.has_min_p()) sampling.min_p = params.min_p();
  if (params.has_typical_p()) sampling.typical_p = params.typical_p();
  sampling.bad_words.assign(params.bad_words().begin(), params.bad_words().end());
  return sampling;
}

engine::StopParams ToStop(const v1::StopParams& params) {
  engine::StopParams stop;
  if (params.has_max_tokens()) stop.max_tokens = params.max_tokens();
  stop.strings.assign(params.strings().begin(), params.strings().end());
  stop.token_ids.assign(params.token_ids().begin(), params.token_ids().end());
  stop.ignore_eos = params.ignore_eos();
  stop.min_tokens = params.min_tokens();
  stop.include_matched = params.include_matched();
  return stop;
}

engine::MemoryMode ToMemoryMode(const v1::MemoryParams& params) {
  engine::MemoryMode mode = {.enabled = !params.has_enabled() || params.enabled()};
  if (params.has_knn()) mode.knn = params.knn();
  mode.layers.assign(params.layers().begin(), params.layers().end());
  mode.masked_rows.assign(params.masked_rows().begin(), params.masked_rows().end());
  return mode;
}

engine::MemoryTraceParams ToMemoryTrace(const v1::MemoryTraceParams& params) {
  engine::MemoryTraceParams trace;
  if (params.has_tokens()) trace.tokens = params.tokens();
  trace.prompt_tokens = params.prompt_tokens();
  if (params.has_entries()) trace.entries = params.entries();
  trace.layers.assign(params.layers().begin(), params.layers().end());
  return trace;
}

absl::StatusOr<engine::StructuredOutput> ToStructured(const v1::StructuredOutput& message) {
  using Kind = engine::StructuredOutput::Kind;
  engine::StructuredOutput structured;
  switch (message.output_case()) {
    case v1::StructuredOutput::kJson:
      if (!message.json()) return absl::InvalidArgumentError("structured.json is false; it must be true");
      return structured;
    case v1::StructuredOutput::kJsonSchema:
      structured.kind = Kind::kJsonSchema;
      structured.text = message.json_schema();
      return structured;
    case v1::StructuredOutput::kRegex:
      structured.kind = Kind::kRegex;
      structured.text = message.regex();
      return structured;
    case v1::StructuredOutput::kGrammar:
      structured.kind = Kind::kGrammar;
      structured.text = message.grammar();
      return structured;
    case v1::StructuredOutput::kChoice:
      structured.kind = Kind::kChoice;
      structured.choices.assign(message.choice().texts().begin(), message.choice().texts().end());
      return structured;
    case v1::StructuredOutput::OUTPUT_NOT_SET:
      break;
  }
  return Missing("structured", "json, json_schema, regex, grammar or choice");
}

engine::SpeculationParams ToSpeculation(const v1::SpeculationParams& params) {
  engine::SpeculationParams speculation;
  if (params.has_max_draft_tokens()) speculation.max_draft_tokens = params.max_draft_tokens();
  if (params.has_min_ngram()) speculation.min_ngram = params.min_ngram();
  if (params.has_max_ngram())
    speculation.max_ngram = params.max_ngram();
  else
    speculation.max_ngram = std::max(speculation.max_ngram, speculation.min_ngram);
  return speculation;
}

engine::SchedulingParams ToScheduling(const v1::SchedulingParams& params) {
  return {.priority = params.priority(),
          .prefix_cache = !params.has_prefix_cache() || params.prefix_cache(),
          .cache_salt = params.cache_salt()};
}

v1::Usage ToProto(const engine::Usage& usage) {
  v1::Usage result;
  result.set_prompt_tokens(usage.prompt_tokens);
  result.set_cached_tokens(usage.cached_tokens);
  result.set_completion_tokens(usage.completion_tokens);
  result.set_draft_tokens(usage.draft_tokens);
  result.set_accepted_draft_tokens(usage.accepted_draft_tokens);
  result.set_all_completion_tokens(usage.all_completion_tokens);
  return result;
}

v1::TopLogprobs ToProto(const std::vector<engine::TokenLogprob>& top) {
  v1::TopLogprobs result;
  for (const auto& [id, logprob] : top) {
    result.add_token_ids(id);
    result.add_logprobs(logprob);
  }
  return result;
}

v1::Timings ToProto(const engine::Timings& timings) {
  v1::Timings result;
  result.set_queue_seconds(absl::ToDoubleSeconds(timings.queue));
  result.set_prefill_seconds(absl::ToDoubleSeconds(timings.prefill));
  result.set_decode_seconds(absl::ToDoubleSeconds(timings.decode));
  return result;
}

v1::ValueTableInfo ToProto(const engine::ValueTableInfo& table) {
  v1::ValueTableInfo result;
  result.set_name(table.name);
  result.mutable_layers()->Assign(table.layers.begin(), table.layers.end());
  result.set_rows(table.rows);
  result.set_dim(table.dim);
  result.set_format(table.format);
  result.set_placement(table.placement);
  result.set_bytes(table.bytes);
  return result;
}

}  // namespace

absl::StatusOr<engine::GenerateRequest> ToEngine(const v1::GenerateRequest& request, const engine::ModelInfo& model,
                                                 absl::Time deadline) {
  RETURN_IF_ERROR(CheckModelName(request, model));
  if (request.prompt_case() == v1::GenerateRequest::PROMPT_NOT_SET) return Missing("prompt", "text, tokens or chat");
  engine::GenerateRequest result;
  result.id = RequestId(request);
  if (request.has_chat()) result.prompt = ToChat(request.chat());
  else result.prompt = ToPrompt(request);
  if (request.has_add_bos()) result.add_bos = request.add_bos();
  result.allow_special = request.allow_special();
  result.sampling = ToSampling(request.sampling());
  result.stop = ToStop(request.stop());
  result.memory = ToMemoryMode(request.memory());
  result.scheduling = ToScheduling(request.scheduling());
  result.logprobs = request.output().logprobs();
  result.token_bytes = request.output().token_bytes();
  result.top_logprobs = request.output().top_logprobs();
  if (request.has_structured()) {
    absl::StatusOr<engine::StructuredOutput> structured = ToStructured(request.structured());
    RETURN_IF_ERROR(structured.status());
    result.structured = *std::move(structured);
  }
  if (request.output().has_prompt_logprobs()) result.prompt_logprobs = request.output().prompt_logprobs();
  result.echo = request.output().echo();
  result.logprob_token_ids.assign(request.output().logprob_token_ids().begin(), request.output().logprob_token_ids().end());
  if (request.has_speculation()) result.speculation = ToSpeculation(request.speculation());
  if (request.has_n()) result.n = request.n();
  if (request.has_best_of()) result.best_of = request.best_of();
  if (request.has_truncate_prompt()) result.truncate_prompt = request.truncate_prompt();
  if (request.output().has_memory_trace()) result.memory_trace = ToMemoryTrace(request.output().memory_trace());
  result.deadline = deadline;
  return result;
}

absl::StatusOr<engine::ScoreRequest> ToEngine(const v1::ScoreRequest& request, const engine::ModelInfo& model,
                                              absl::Time deadline) {
  RETURN_IF_ERROR(CheckModelName(request, model));
  if (request.context_case() == v1::ScoreRequest::CONTEXT_NOT_SET) return Missing("context", "text or tokens");
  engine::ScoreRequest result;
  result.id = RequestId(request);
  result.context = ToPrompt(request);
  if (request.has_add_bos()) result.add_bos = request.add_bos();
  for (const v1::Continuation& continuation : request.continuations()) {
    if (continuation.continuation_case() == v1::Continuation::CONTINUATION_NOT_SET) {
      return Missing(absl::StrFormat("continuations[%d]", result.continuations.size()), "text or tokens");
    }
    result.continuations.push_back(ToPrompt(continuation));
  }
  result.memory = ToMemoryMode(request.memory());
  result.scheduling = ToScheduling(request.scheduling());
  result.deadline = deadline;
  return result;
}

v1::PromptDelta ToProto(engine::PromptDelta delta) {
  v1::PromptDelta result;
  result.set_first(delta.first);
  result.set_text(std::move(delta.text));
  result.mutable_token_ids()->Assign(delta.token_ids.begin(), delta.token_ids.end());
  result.mutable_logprobs()->Assign(delta.logprobs.begin(), delta.logprobs.end());
  for (std::string& bytes : delta.token_bytes) result.add_token_bytes(std::move(bytes));
  for (const std::vector<engine::TokenLogprob>& top : delta.top_logprobs) *result.add_top_logprobs() = ToProto(top);
  return result;
}

void Join(engine::Delta delta, v1::Delta& waiting) {
  waiting.set_choice(delta.choice);
  waiting.mutable_text()->append(delta.text);
  waiting.mutable_token_ids()->Add(delta.token_ids.begin(), delta.token_ids.end());
  waiting.mutable_logprobs()->Add(delta.logprobs.begin(), delta.logprobs.end());
  for (std::string& bytes : delta.token_bytes) waiting.add_token_bytes(std::move(bytes));
  for (const std::vector<engine::TokenLogprob>& top : delta.top_logprobs) *waiting.add_top_logprobs() = ToProto(top);
  for (const std::vector<float>& chosen : delta.chosen_logprobs)
    waiting.mutable_chosen_logprobs()->Add(chosen.begin(), chosen.end());
  for (const engine::TokenTrace& trace : delta.memory_traces) *waiting.add_memory_traces() = ToProto(trace);
}

v1::TokenTrace ToProto(const engine::TokenTrace& trace) {
  v1::TokenTrace result;
  result.set_position(trace.position);
  result.set_token_id(trace.token_id);
  for (const engine::LayerTrace& layer : trace.layers) {
    v1::LayerTrace& to = *result.add_layers();
    to.set_layer(layer.layer);
    to.mutable_heads()->Assign(layer.heads.begin(), layer.heads.end());
    to.mutable_rows()->Assign(layer.rows.begin(), layer.rows.end());
    to.mutable_weights()->Assign(layer.weights.begin(), layer.weights.end());
  }
  return result;
}

v1::Finished ToProto(engine::Finished finished, const std::string& request_id) {
  v1::Finished result;
  result.set_reason(finished.reason == engine::FinishReason::kStop ? v1::FINISH_REASON_STOP : v1::FINISH_REASON_LENGTH);
  if (finished.stop_string.has_value()) result.set_stop_string(*std::move(finished.stop_string));
  if (finished.stop_token_id.has_value()) result.set_stop_token_id(*finished.stop_token_id);
  *result.mutable_usage() = ToProto(finished.usage);
  *result.mutable_timings() = ToProto(finished.timings);
  result.set_seed(finished.seed);
  result.set_choice(finished.choice);
  result.set_request_id(request_id);
  result.set_text(std::move(finished.text));
  return result;
}

v1::ScoreResponse ToProto(const engine::ScoreResult& result, const std::string& request_id) {
  v1::ScoreResponse response;
  for (const engine::ContinuationScore& score : result.scores) {
    v1::ContinuationScore& to = *response.add_scores();
    to.set_logprob(score.logprob);
    to.set_is_greedy(score.is_greedy);
    to.mutable_token_ids()->Assign(score.token_ids.begin(), score.token_ids.end());
    to.mutable_token_logprobs()->Assign(score.token_logprobs.begin(), score.token_logprobs.end());
  }
  *response.mutable_usage() = ToProto(result.usage);
  response.set_request_id(request_id);
  return response;
}

v1::GetModelResponse ToProto(const engine::ModelInfo& model) {
  v1::GetModelResponse response;
  response.set_model(model.name);
  response.set_architecture(model.architecture);
  response.set_vocab_size(model.vocab_size);
  response.set_max_context_tokens(model.max_context_tokens);
  response.set_dim(model.dim);
  response.set_n_layers(model.n_layers);
  response.set_n_heads(model.n_heads);
  response.set_n_kv_heads(model.n_kv_heads);
  response.set_trunk_parameters(model.trunk_parameters);
  for (const engine::ValueTableInfo& table : model.value_tables) *response.add_value_tables() = ToProto(table);
  response.mutable_eos_token_ids()->Assign(model.eos_token_ids.begin(), model.eos_token_ids.end());
  if (model.bos_token_id.has_value()) response.set_bos_token_id(*model.bos_token_id);
  response.set_tokenizer(model.tokenizer);
  response.set_chat(model.chat);
  response.set_structured(model.structured);
  response.mutable_memory_layers()->Assign(model.memory_layers.begin(), model.memory_layers.end());
  response.set_memory_rows(model.memory_rows);
  response.set_mem_heads(model.mem_heads);
  response.set_mem_knn(model.mem_knn);
  response.set_backend(model.backend);
  response.set_isa(model.isa);
  response.set_weight_dtype(model.weight_dtype);
  response.set_activation_dtype(model.activation_dtype);
  response.set_kv_dtype(model.kv_dtype);
  response.set_devices(model.devices);
  response.set_server_version(MEMSERVE_VERSION);
  return response;
}

v1::GetLoadResponse ToProto(const engine::Load& load) {
  v1::GetLoadResponse response;
  response.set_running(load.running);
  response.set_waiting(load.waiting);
  response.set_waiting_tokens(load.waiting_tokens);
  response.set_kv_pages_total(load.kv_pages_total);
  response.set_kv_pages_used(load.kv_pages_used);
  response.set_kv_page_size(load.kv_page_size);
  response.set_steps(load.steps);
  response.set_prompt_tokens(load.prompt_tokens);
  response.set_completion_tokens(load.completion_tokens);
  response.set_last_step_seconds(absl::ToDoubleSeconds(load.last_step));
  response.set_draining(load.draining);
  response.set_requests(load.requests);
  response.set_ended_requests(load.ended_requests);
  response.set_kv_pages_cached(load.kv_pages_cached);
  response.set_cached_tokens(load.cached_tokens);
  response.set_preemptions(load.preemptions);
  response.set_preempted(load.preempted);
  response.set_step_median_seconds(load.recent.median_seconds);
  response.set_step_p99_seconds(load.recent.p99_seconds);
  response.set_draft_tokens(load.draft_tokens);
  response.set_accepted_draft_tokens(load.accepted_draft_tokens);
  return response;
}

absl::StatusOr<v1::GetTableResponse> ToTables(const v1::GetTableRequest& request, const engine::ModelInfo& model) {
  if (model.memory_layers.empty()) return absl::UnimplementedError("the model has no memory layers");
  v1::GetTableResponse response;
  for (const engine::ValueTableInfo& table : model.value_tables) {
    const bool reads = std::find(table.layers.begin(), table.layers.end(), request.layer()) != table.layers.end();
    if (reads || !request.has_layer()) *response.add_tables() = ToProto(table);
  }
  if (response.tables_size() > 0) return response;
  return absl::InvalidArgumentError(
      absl::StrCat("layer: ", request.layer(), " has no memory; these do: ", absl::StrJoin(model.memory_layers, ", ")));
}

engine::ReadRowsRequest ToEngine(const v1::GetRowsRequest& request) {
  engine::ReadRowsRequest result;
  if (request.has_layer()) result.layer = request.layer();
  result.rows.assign(request.rows().begin(), request.rows().end());
  return result;
}

v1::GetRowsResponse ToProto(const engine::TableRows& rows, const v1::GetRowsRequest& request) {
  v1::GetRowsResponse response;
  for (int i = 0; i < request.rows_size(); ++i) {
    v1::TableRow& row = *response.add_rows();
    row.set_row(request.rows(i));
    row.mutable_values()->Assign(rows.values.begin() + i * rows.dim, rows.values.begin() + (i + 1) * rows.dim);
    if (rows.experts.empty()) continue;
    row.mutable_experts()->Assign(rows.experts.begin() + i * rows.dim, rows.experts.begin() + (i + 1) * rows.dim);
  }
  return response;
}

engine::RowStatsRequest ToEngine(const v1::RowStatsRequest& request) {
  engine::RowStatsRequest result;
  if (request.has_layer()) result.layer = request.layer();
  if (request.has_top()) result.top = request.top();
  result.rows.assign(request.rows().begin(), request.rows().end());
  result.reset = request.reset();
  return result;
}

v1::RowStatsResponse ToProto(const engine::RowStats& stats, const v1::RowStatsRequest& request) {
  v1::RowStatsResponse response;
  response.set_table_rows(stats.table_rows);
  response.set_reads(stats.reads);
  response.set_distinct_rows(stats.distinct_rows);
  response.set_since_seconds(absl::ToDoubleSeconds(stats.since));
  const auto set = [](v1::RowCount& to, int32_t row, uint32_t count) {
    to.set_row(row);
    to.set_count(count);
  };
  for (const auto& [row, count] : stats.top) set(*response.add_top(), row, count);
  for (int i = 0; i < request.rows_size(); ++i) set(*response.add_rows(), request.rows(i), stats.counts[i]);
  return response;
}

absl::StatusOr<engine::GenerateRequest> ToEngine(const v1::TraceRequest& request, const engine::ModelInfo& model,
                                                 absl::Time deadline) {
  v1::GenerateRequest generate;
  if (request.has_request_id()) generate.set_request_id(request.request_id());
  if (request.has_model()) generate.set_model(request.model());
  if (request.has_text()) generate.set_text(request.text());
  if (request.has_tokens()) *generate.mutable_tokens() = request.tokens();
  if (request.has_chat()) *generate.mutable_chat() = request.chat();
  if (request.has_add_bos()) generate.set_add_bos(request.add_bos());
  if (request.has_allow_special()) generate.set_allow_special(request.allow_special());
  *generate.mutable_memory() = request.memory();
  *generate.mutable_scheduling() = request.scheduling();
  v1::MemoryTraceParams& trace = *generate.mutable_output()->mutable_memory_trace();
  trace = request.memory_trace();
  trace.set_tokens(0);
  if (!trace.has_prompt_tokens()) trace.set_prompt_tokens(model.max_context_tokens);
  generate.mutable_stop()->set_max_tokens(1);
  return ToEngine(generate, model, deadline);
}

absl::Time Deadline(const grpc::CallbackServerContext& context) {
  const gpr_timespec deadline = context.raw_deadline();
  if (gpr_time_cmp(deadline, gpr_inf_future(deadline.clock_type)) == 0) return absl::InfiniteFuture();
  return absl::FromChrono(context.deadline());
}

grpc::Status ToGrpc(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  const std::string message(status.message());
  if (!absl::IsResourceExhausted(status)) return {static_cast<grpc::StatusCode>(status.raw_code()), message};
  google::rpc::RetryInfo retry;
  const absl::Duration after = engine::RetryAfter(status).value_or(kRetryAfter);
  retry.mutable_retry_delay()->set_seconds(absl::ToInt64Seconds(after));
  retry.mutable_retry_delay()->set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(after % absl::Seconds(1))));
  google::rpc::Status detailed;
  detailed.set_code(grpc::StatusCode::RESOURCE_EXHAUSTED);
  detailed.set_message(message);
  detailed.add_details()->PackFrom(retry);
  grpc::Status result;
  grpc::SetErrorDetails(detailed, &result);
  return result;
}

}  // namespace memserve::server
