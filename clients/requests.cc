#include "clients/requests.h"

#include <charconv>
#include <cstdio>
#include <iostream>
#include <iterator>
#include <vector>

#include "google/protobuf/descriptor.h"
#include "google/protobuf/message.h"

namespace memserve::clients {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;
using nlohmann::ordered_json;

// The shortest decimal that is this float, not that of the double it widens to.
double Shortest(float value) {
  char text[32];
  const auto end = std::to_chars(text, text + sizeof text, value).ptr;
  double shortest = value;
  std::from_chars(text, end, shortest);
  return shortest;
}

std::string Base64(const std::string& bytes) {
  static constexpr char kDigits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    uint32_t group = 0;
    for (size_t j = 0; j < 3; ++j) group = group << 8 | (i + j < bytes.size() ? static_cast<unsigned char>(bytes[i + j]) : 0);
    for (size_t j = 0; j < 4; ++j) text += i + j <= bytes.size() ? kDigits[group >> (18 - 6 * j) & 63] : '=';
  }
  return text;
}

// index < 0: the field is not repeated.
ordered_json ValueToJson(const Message& message, const FieldDescriptor* field, int index) {
  const Reflection* of = message.GetReflection();
  const bool one = index < 0;
  switch (field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT32:
      return one ? of->GetInt32(message, field) : of->GetRepeatedInt32(message, field, index);
    case FieldDescriptor::CPPTYPE_INT64:
      return one ? of->GetInt64(message, field) : of->GetRepeatedInt64(message, field, index);
    case FieldDescriptor::CPPTYPE_UINT32:
      return one ? of->GetUInt32(message, field) : of->GetRepeatedUInt32(message, field, index);
    case FieldDescriptor::CPPTYPE_UINT64:
      return one ? of->GetUInt64(message, field) : of->GetRepeatedUInt64(message, field, index);
    case FieldDescriptor::CPPTYPE_FLOAT:
      return Shortest(one ? of->GetFloat(message, field) : of->GetRepeatedFloat(message, field, index));
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return one ? of->GetDouble(message, field) : of->GetRepeatedDouble(message, field, index);
    case FieldDescriptor::CPPTYPE_BOOL:
      return one ? of->GetBool(message, field) : of->GetRepeatedBool(message, field, index);
    case FieldDescriptor::CPPTYPE_ENUM:
      return (one ? of->GetEnum(message, field) : of->GetRepeatedEnum(message, field, index))->name();
    case FieldDescriptor::CPPTYPE_STRING: {
      const std::string text = one ? of->GetString(message, field) : of->GetRepeatedString(message, field, index);
      return field->type() == FieldDescriptor::TYPE_BYTES ? Base64(text) : text;
    }
    case FieldDescriptor::CPPTYPE_MESSAGE:
      return ToJson(one ? of->GetMessage(message, field) : of->GetRepeatedMessage(message, field, index));
  }
  return nullptr;
}

}  // namespace

bool ParseIds(const std::string& text, v1::TokenIds& ids) {
  const char* at = text.data();
  const char* const end = at + text.size();
  while (at != end) {
    if (*at == ' ' || *at == ',' || *at == '\n' || *at == '\t') {
      ++at;
      continue;
    }
    int32_t id = 0;
    const auto [after, error] = std::from_chars(at, end, id);
    if (error != std::errc()) return false;
    ids.add_ids(id);
    at = after;
  }
  return true;
}

bool ReadPrompt(const Options& options, const std::string& word, std::optional<std::string>& text, v1::TokenIds& ids) {
  std::string prompt = word;
  if (word == "-") prompt.assign(std::istreambuf_iterator<char>(std::cin), {});
  if (options.token_ids) return ParseIds(prompt, ids);
  text = std::move(prompt);
  return true;
}

v1::SchedulingParams ToScheduling(const Options& options) {
  v1::SchedulingParams scheduling;
  if (options.priority) scheduling.set_priority(*options.priority);
  if (options.prefix_cache) scheduling.set_prefix_cache(*options.prefix_cache);
  if (!options.cache_salt.empty()) scheduling.set_cache_salt(options.cache_salt);
  return scheduling;
}

v1::MemoryParams ToMemory(const Options& options) {
  v1::MemoryParams memory;
  if (options.memory) memory.set_enabled(*options.memory);
  if (options.memory_knn) memory.set_knn(*options.memory_knn);
  memory.mutable_layers()->Assign(options.memory_layers.begin(), options.memory_layers.end());
  memory.mutable_masked_rows()->Assign(options.masked_rows.begin(), options.masked_rows.end());
  return memory;
}

void PrintTrace(const v1::TokenTrace& trace) {
  for (const v1::LayerTrace& layer : trace.layers()) {
    for (int i = 0; i < layer.rows_size(); ++i) {
      std::printf("%d\t%d\t%d\t%d\t%d\t%.6f\n", trace.position(), trace.token_id(), layer.layer(), layer.heads(i), layer.rows(i),
                  layer.weights(i));
    }
  }
}

v1::GenerateRequest ToGenerateRequest(const Options& options) {
  v1::GenerateRequest request;
  if (!options.request_id.empty()) request.set_request_id(options.request_id);
  if (!options.model.empty()) request.set_model(options.model);
  if (options.add_bos) request.set_add_bos(*options.add_bos);
  if (options.allow_special) request.set_allow_special(true);
  v1::SamplingParams& sampling = *request.mutable_sampling();
  if (options.temperature) sampling.set_temperature(*options.temperature);
  if (options.top_k) sampling.set_top_k(*options.top_k);
  if (options.top_p) sampling.set_top_p(*options.top_p);
  if (options.seed) sampling.set_seed(*options.seed);
  if (options.min_p) sampling.set_min_p(*options.min_p);
  if (options.typical_p) sampling.set_typical_p(*options.typical_p);
  if (options.repetition_penalty) sampling.set_repetition_penalty(*options.repetition_penalty);
  if (options.presence_penalty) sampling.set_presence_penalty(*options.presence_penalty);
  if (options.frequency_penalty) sampling.set_frequency_penalty(*options.frequency_penalty);
  if (options.top_logprobs) request.mutable_output()->set_top_logprobs(*options.top_logprobs);
  for (const std::string& word : options.bad_words) sampling.add_bad_words(word);
  if (options.prompt_logprobs) request.mutable_output()->set_prompt_logprobs(*options.prompt_logprobs);
  if (options.echo) request.mutable_output()->set_echo(true);
  if (options.n) request.set_n(*options.n);
  if (options.best_of) request.set_best_of(*options.best_of);
  if (options.truncate_prompt) request.set_truncate_prompt(*options.truncate_prompt);
  if (options.speculate) request.mutable_speculation()->set_max_draft_tokens(*options.speculate);
  v1::StopParams& stop = *request.mutable_stop();
  if (options.include_stop) stop.set_include_matched(true);
  if (options.max_tokens) stop.set_max_tokens(*options.max_tokens);
  for (const std::string& text : options.stop) stop.add_strings(text);
  if (options.ignore_eos) stop.set_ignore_eos(*options.ignore_eos);
  if (options.min_tokens) stop.set_min_tokens(*options.min_tokens);
  if (options.logprobs) {
    request.mutable_output()->set_logprobs(true);
    request.mutable_output()->set_token_bytes(true);
  }
  if (options.trace) {
    v1::MemoryTraceParams& trace = *request.mutable_output()->mutable_memory_trace();
    if (options.trace_entries) trace.set_entries(*options.trace_entries);
    if (options.trace_tokens) trace.set_tokens(*options.trace_tokens);
  }
  *request.mutable_memory() = ToMemory(options);
  *request.mutable_scheduling() = ToScheduling(options);
  return request;
}

ordered_json ToJson(const Message& message) {
  ordered_json json = ordered_json::object();
  const Reflection* of = message.GetReflection();
  for (int i = 0; i < message.GetDescriptor()->field_count(); ++i) {
    const FieldDescriptor* field = message.GetDescriptor()->field(i);
    if (field->is_repeated()) {
      ordered_json& list = json[field->name()] = ordered_json::array();
      for (int j = 0; j < of->FieldSize(message, field); ++j) list.push_back(ValueToJson(message, field, j));
    } else if (!field->has_presence() || of->HasField(message, field)) {
      json[field->name()] = ValueToJson(message, field, -1);
    }
  }
  return json;
}

void PrintJson(const ordered_json& json) {
  std::puts(json.dump(-1, ' ', false, ordered_json::error_handler_t::replace).c_str());
  std::fflush(stdout);
}

}  // namespace memserve::clients
