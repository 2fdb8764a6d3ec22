// Requests of random and of mutated bytes, and of random fields, against a real engine: each ends once, with a code that names
// whose fault it is, and nothing is left behind.
#include <limits>
#include <random>

#include "engine/structured/grammar.h"
#include "google/protobuf/descriptor.h"
#include "google/protobuf/message.h"
#include "google/protobuf/stubs/logging.h"
#include "gtest/gtest.h"
#include "spdlog/spdlog.h"
#include "tests/fuzz/request_target.h"

namespace memserve::server {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;
using Random = std::mt19937;

constexpr int kTogether = 6;  // requests that run beside each other

// Valid requests that have all fields between them.
std::vector<v1::GenerateRequest> GenerateSeeds() {
  std::vector<v1::GenerateRequest> seeds;
  v1::GenerateRequest all;
  all.set_request_id("request");
  all.set_model("checkpoint");
  all.set_text("Once the keeper of the light");
  all.set_add_bos(true);
  all.set_allow_special(true);
  v1::SamplingParams& sampling = *all.mutable_sampling();
  sampling.set_temperature(0.8f);
  sampling.set_top_k(40);
  sampling.set_top_p(0.9f);
  sampling.set_seed(3);
  sampling.set_repetition_penalty(1.1f);
  sampling.set_frequency_penalty(0.1f);
  sampling.set_presence_penalty(0.2f);
  sampling.set_penalty_window(32);
  (*sampling.mutable_logit_bias())[65] = 2.0f;
  sampling.add_banned_token_ids(66);
  for (int id = 32; id < 127; ++id) sampling.add_allowed_token_ids(id);
  sampling.set_min_p(0.05f);
  sampling.set_typical_p(0.95f);
  sampling.add_bad_words("light");
  v1::StopParams& stop = *all.mutable_stop();
  stop.set_max_tokens(12);
  stop.add_strings("zq");
  stop.add_token_ids(10);
  stop.set_ignore_eos(true);
  stop.set_min_tokens(2);
  stop.set_include_matched(true);
  v1::OutputParams& output = *all.mutable_output();
  output.set_logprobs(true);
  output.set_token_bytes(true);
  output.set_top_logprobs(3);
  output.set_prompt_logprobs(2);
  output.set_echo(true);
  output.add_logprob_token_ids(65);
  v1::MemoryTraceParams& trace = *output.mutable_memory_trace();
  trace.set_tokens(3);
  trace.set_prompt_tokens(2);
  trace.set_entries(4);
  trace.add_layers(1);
  v1::MemoryParams& memory = *all.mutable_memory();
  memory.set_enabled(true);
  memory.set_knn(4);
  memory.add_layers(4);
  memory.add_masked_rows(17);
  v1::SchedulingParams& scheduling = *all.mutable_scheduling();
  scheduling.set_priority(5);
  scheduling.set_prefix_cache(true);
  scheduling.set_cache_salt("salt");
  all.mutable_speculation()->set_max_draft_tokens(4);
  all.mutable_speculation()->set_min_ngram(1);
  all.mutable_speculation()->set_max_ngram(3);
  all.set_n(2);
  all.set_best_of(3);
  all.set_truncate_prompt(20);
  seeds.push_back(all);

  v1::GenerateRequest plain;
  for (const int id : {84, 104, 101, 32, 116, 104, 101, 32, 116, 104, 101}) plain.mutable_tokens()->add_ids(id);
  plain.mutable_stop()->set_max_tokens(10);
  plain.mutable_speculation();
  seeds.push_back(plain);

  v1::GenerateRequest chat;
  v1::ChatMessage& message = *chat.mutable_chat()->add_messages();
  message.set_role("user");
  message.set_content("Who keeps the light?");
  chat.mutable_chat()->set_add_generation_prompt(true);
  seeds.push_back(chat);

  if (!engine::StructuredOutputIsBuilt()) return seeds;
  v1::GenerateRequest structured = plain;
  structured.mutable_sampling()->set_temperature(1);
  structured.mutable_structured()->set_json(true);
  seeds.push_back(structured);
  structured.mutable_structured()->set_json_schema(R"({"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]})");
  seeds.push_back(structured);
  structured.mutable_structured()->set_regex("[a-f]{2,5}(x|yz)*");
  seeds.push_back(structured);
  structured.mutable_structured()->set_grammar("root ::= \"a\" [0-9]+ | other\nother ::= \"(\" root \")\"\n");
  seeds.push_back(structured);
  structured.mutable_structured()->mutable_choice()->add_texts("yes");
  structured.mutable_structured()->mutable_choice()->add_texts("no");
  structured.set_n(2);
  seeds.push_back(structured);
  return seeds;
}

std::vector<v1::ScoreRequest> ScoreSeeds() {
  v1::ScoreRequest texts;
  texts.set_request_id("request");
  texts.set_model("checkpoint");
  texts.set_text("The keeper of");
  texts.set_add_bos(true);
  texts.add_continuations()->set_text(" the light");
  texts.add_continuations()->set_text(" nothing");
  texts.mutable_memory()->set_knn(3);
  texts.mutable_scheduling()->set_priority(-2);
  v1::ScoreRequest ids;
  for (const int id : {84, 104, 101}) ids.mutable_tokens()->add_ids(id);
  for (const int id : {32, 97}) ids.add_continuations()->mutable_tokens()->add_ids(id);
  return {texts, ids};
}

// --- bytes

std::string Mutated(std::string bytes, const std::string& other, Random& random) {
  static const std::string kVarints[] = {std::string("\0", 1),
                                         "\x01",
                                         "\x7f",
                                         "\xff\xff\xff\xff\x07",
                                         "\xff\xff\xff\xff\x0f",
                                         "\x80\x80\x80\x80\x08",
                                         "\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"};
  for (uint32_t changes = 1 + random() % 4; changes > 0 && !bytes.empty(); --changes) {
    const size_t at = random() % bytes.size();
    switch (random() % 7) {
      case 0:
        bytes[at] ^= static_cast<char>(1 << random() % 8);
        break;
      case 1:
        bytes[at] = static_cast<char>(random());
        break;
      case 2:
        bytes.insert(at, 1 + random() % 4, static_cast<char>(random()));
        break;
      case 3:
        bytes.erase(at, 1 + random() % 8);
        break;
      case 4:
        bytes.replace(at, 1, kVarints[random() % std::size(kVarints)]);
        break;
      case 5:  // what another request ends with: fields of both
        bytes += other.substr(random() % (other.size() + 1));
        break;
      default:
        bytes.insert(at, bytes, random() % bytes.size(), 1 + random() % 32);
    }
  }
  return bytes;
}

// --- fields

template <typename T>
T Number(Random& random) {
  constexpr T kExtremes[] = {0, 1, static_cast<T>(-1), std::numeric_limits<T>::lowest(), std::numeric_limits<T>::max()};
  if (random() % 2 == 0) return kExtremes[random() % std::size(kExtremes)];
  return static_cast<T>(random() % (random() % 2 == 0 ? 8 : 300));
}

float Real(Random& random) {
  using Limits = std::numeric_limits<float>;
  constexpr float kExtremes[] = {0,
                                 -0.0f,
                                 1,
                                 -1,
                                 100,
                                 Limits::quiet_NaN(),
                                 Limits::infinity(),
                                 -Limits::infinity(),
                                 Limits::max(),
                                 Limits::lowest(),
                                 Limits::min(),
                                 Limits::denorm_min()};
  if (random() % 2 == 0) return kExtremes[random() % std::size(kExtremes)];
  return static_cast<float>(random() % 1000) / 500;
}

std::string Text(Random& random) {
  static const char* const kPieces[] = {"a",         "The", " ",    "\"",
                                        "\\",        "(",   ")",    "[",
                                        "]",         "{",   "}",    "*",
                                        "+",         "?",   "|",    "0",
                                        "9",         "^",   "$",    ".",
                                        "root ::= ", "é",   "日本", "\xf0\x9f\x98\x80",
                                        "\n",        "\t",  "\x01", "{\"type\":\"string\"}",
                                        "{2,9}",     "<s>"};
  std::string text;
  for (uint32_t pieces = random() % 8 == 0 ? random() % 3000 : random() % 12; pieces > 0; --pieces)
    text += kPieces[random() % std::size(kPieces)];
  if (random() % 16 == 0) text += '\0';
  return text;
}

void Fill(Message& message, Random& random, int share);

// One value of the field, or one more of a repeated field.
void Set(Message& message, const FieldDescriptor* field, Random& random) {
  const Reflection& at = *message.GetReflection();
  const bool many = field->is_repeated();
  switch (field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT32:
      return many ? at.AddInt32(&message, field, Number<int32_t>(random)) : at.SetInt32(&message, field, Number<int32_t>(random));
    case FieldDescriptor::CPPTYPE_UINT64:
      return at.SetUInt64(&message, field, Number<uint64_t>(random));
    case FieldDescriptor::CPPTYPE_FLOAT:
      return at.SetFloat(&message, field, Real(random));
    case FieldDescriptor::CPPTYPE_BOOL:
      return at.SetBool(&message, field, random() % 2 == 0);
    case FieldDescriptor::CPPTYPE_STRING:
      return many ? at.AddString(&message, field, Text(random)) : at.SetString(&message, field, Text(random));
    case FieldDescriptor::CPPTYPE_MESSAGE:
      return Fill(many ? *at.AddMessage(&message, field) : *at.MutableMessage(&message, field), random, 2);
    default:
      FAIL() << "a request has a field of a new type: " << field->full_name();
  }
}

// Sets a field in `share`; those of a map and of a list by the dozen, now and then by the thousand.
void Fill(Message& message, Random& random, int share) {
  for (int i = 0; i < message.GetDescriptor()->field_count(); ++i) {
    const FieldDescriptor* field = message.GetDescriptor()->field(i);
    if (random() % share != 0) continue;
    uint32_t count = !field->is_repeated() ? 1 : random() % 16 == 0 ? random() % 3000 : random() % 12;
    if (field->cpp_type() == FieldDescriptor::CPPTYPE_STRING) count = std::min(count, 40u);
    for (; count > 0; --count) Set(message, field, random);
  }
}

// Of good seeds a few fields are changed, so that much of what comes gets past the first check.
template <typename Request>
std::string RandomFields(const std::vector<Request>& seeds, Random& random) {
  Request request;
  if (random() % 4 != 0) request = seeds[random() % seeds.size()];
  Fill(request, random, random() % 2 == 0 ? 12 : 4);
  if (random() % 8 != 0) {
    request.clear_model();
    request.clear_request_id();
  }
  return request.SerializeAsString();
}

// --- the test

void Feed(uint32_t seed, int count) {
  spdlog::set_level(spdlog::level::err);
  google::protobuf::LogSilencer silent;  // of text that is not UTF-8
  Random random(seed);
  const std::vector<v1::GenerateRequest> generate_seeds = GenerateSeeds();
  const std::vector<v1::ScoreRequest> score_seeds = ScoreSeeds();
  engine::EngineOptions options = fuzz::RequestTarget::Options();
  options.grammar_worker = std::string(MEMSERVE).substr(0, std::string(MEMSERVE).rfind('/')) + "/../engine/memserve-grammar";
  fuzz::RequestTarget target(options);
  const auto bytes_of = [&](const auto& seeds) { return seeds[random() % seeds.size()].SerializeAsString(); };
  for (const v1::GenerateRequest& one : generate_seeds) {
    target.Generate(one.SerializeAsString(), true);
    ASSERT_EQ(target.Settle(), "");
  }
  for (const v1::ScoreRequest& one : score_seeds) target.Score(one.SerializeAsString());
  ASSERT_EQ(target.Settle(), "");
  const int good = target.ended_with(absl::StatusCode::kOk);
  EXPECT_EQ(good, static_cast<int>(generate_seeds.size() + score_seeds.size()) - 1);  // no chat template
  for (int i = 0; i < count; ++i) {
    const bool capped = random() % 2 == 0;
    switch (random() % 8) {
      case 0: {
        std::string bytes(random() % 64, '\0');
        for (char& c : bytes) c = static_cast<char>(random());
        target.Generate(bytes, capped);
        target.Score(bytes);
        break;
      }
      case 1:
        target.Score(Mutated(bytes_of(score_seeds), bytes_of(score_seeds), random));
        break;
      case 2:
        target.Score(RandomFields(score_seeds, random));
        break;
      case 3:
      case 4:
      case 5:
        target.Generate(RandomFields(generate_seeds, random), capped);
        break;
      default:
        target.Generate(Mutated(bytes_of(generate_seeds), bytes_of(generate_seeds), random), capped);
    }
    if (i % kTogether == kTogether - 1) {
      ASSERT_EQ(target.Settle(), "") << "after " << i;
    }
  }
  ASSERT_EQ(target.Settle(), "");
  ASSERT_EQ(target.CheckEngine(), "");
  // Some went through, and some did not.
  EXPECT_GT(target.ended_with(absl::StatusCode::kOk), good + count / 20);
  EXPECT_GT(target.ended_with(absl::StatusCode::kInvalidArgument), count / 20);
}

TEST(RequestFuzzTest, HostileRequestsEndOnceAndLeaveNothing) { Feed(1, 4000); }
TEST(RequestFuzzLongTest, ManyHostileRequestsEndOnceAndLeaveNothing) {
  for (uint32_t seed = 2; seed < 22 && !HasFailure(); ++seed) Feed(seed, 10'000);
}

}  // namespace
}  // namespace memserve::server
