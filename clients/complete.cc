// Prints a completion as it comes, and measures streams.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <iostream>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "clients/call.h"
#include "clients/commands.h"
#include "clients/requests.h"
#include "grpcpp/support/sync_stream.h"

namespace memserve::clients {
namespace {

void AddMessage(v1::Chat& chat, const std::string& role, const std::string& content) {
  v1::ChatMessage& message = *chat.add_messages();
  message.set_role(role);
  message.set_content(content);
}

std::optional<v1::GenerateRequest> ToRequestWithPrompt(const Options& options) {
  v1::GenerateRequest request = ToGenerateRequest(options);
  std::optional<std::string> text;
  v1::TokenIds ids;
  if (options.words.size() != 1 || !ReadPrompt(options, options.words[0], text, ids)) return std::nullopt;
  if (text && options.chat) {
    if (!options.system.empty()) AddMessage(*request.mutable_chat(), "system", options.system);
    AddMessage(*request.mutable_chat(), "user", *text);
  } else if (text) {
    request.set_text(*std::move(text));
  } else {
    *request.mutable_tokens() = ids;
  }
  return request;
}

constexpr char kPromptNeeded[] = "give one PROMPT (- reads it from standard input; with --token_ids it is ids such as 1,2,3)";

// Text streams on, that of several choices once a choice has ended; ids and logprobs are a line per token, traces a line per row
// that fired.
class Printer {
 public:
  explicit Printer(const Options& options) : options_(options) {}

  void Print(const v1::GenerateResponse& message) {
    if (options_.json) {
      PrintJson(ToJson(message));
    } else if (options_.logprobs || options_.trace) {
      PrintLogprobs(message.delta());
      for (const v1::TokenTrace& trace : message.delta().memory_traces()) PrintTrace(trace);
    } else if (options_.token_ids) {
      for (const int32_t id : message.delta().token_ids()) std::printf("%d\n", id);
    } else if (message.has_prompt()) {
      PrintText(message.prompt().text());
    } else if (options_.n.value_or(1) > 1) {
      const int choice = message.has_finished() ? message.finished().choice() : message.delta().choice();
      texts_[choice] += message.has_finished() ? message.finished().text() : message.delta().text();
      if (message.has_finished()) PrintText("[" + std::to_string(choice) + "]" + texts_[choice] + "\n");
    } else {
      PrintText(message.has_finished() ? message.finished().text() : message.delta().text());
      if (message.has_finished() && !ends_line_) PrintText("\n");
    }
    std::fflush(stdout);
  }

 private:
  void PrintText(const std::string& text) {
    std::fwrite(text.data(), 1, text.size(), stdout);
    if (!text.empty()) ends_line_ = text.back() == '\n';
  }

  static void PrintLogprobs(const v1::Delta& delta) {
    for (int i = 0; i < delta.logprobs_size() && i < delta.token_ids_size(); ++i) {
      const nlohmann::json bytes = i < delta.token_bytes_size() ? delta.token_bytes(i) : std::string();
      std::printf("%.4f\t%d\t%s\n", delta.logprobs(i), delta.token_ids(i),
                  bytes.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace).c_str());
    }
  }

  const Options& options_;
  bool ends_line_ = false;
  std::map<int, std::string> texts_;  // of choices
};

std::string DescribeEnd(const v1::Finished& finished) {
  if (finished.reason() == v1::FINISH_REASON_LENGTH) return "length";
  if (finished.matched_stop_case() == v1::Finished::kStopString)
    return "stop string " + nlohmann::json(finished.stop_string()).dump();
  return "stop token " + std::to_string(finished.stop_token_id());
}

void PrintStats(const v1::Finished& finished) {
  const v1::Usage& usage = finished.usage();
  const v1::Timings& timings = finished.timings();
  const int decoded = usage.completion_tokens() - 1;
  std::fprintf(stderr, "%d prompt tokens (%d cached), %d completion tokens, %s; queue %.1f ms, prefill %.1f ms, decode %.1f ms",
               usage.prompt_tokens(), usage.cached_tokens(), usage.completion_tokens(), DescribeEnd(finished).c_str(),
               1e3 * timings.queue_seconds(), 1e3 * timings.prefill_seconds(), 1e3 * timings.decode_seconds());
  if (decoded > 0 && timings.decode_seconds() > 0) std::fprintf(stderr, " (%.0f tokens/s)", decoded / timings.decode_seconds());
  if (usage.draft_tokens() > 0)
    std::fprintf(stderr, "; %d of %d guesses right", usage.accepted_draft_tokens(), usage.draft_tokens());
  std::fprintf(stderr, "; seed %llu, id %s\n", static_cast<unsigned long long>(finished.seed()), finished.request_id().c_str());
}

// One stream from here: microseconds of the whole call less what the engine says passed before its first token.
struct Stream {
  double call_us = 0;
  double decode_us = 0;  // by the engine's clock, after the first token
  int tokens = 0;
};

grpc::Status MeasureStream(const Options& options, v1::Inference::Stub& stub, const v1::GenerateRequest& request, Stream& stream) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point start = Clock::now();
  Call call(options);
  const std::unique_ptr<grpc::ClientReader<v1::GenerateResponse>> reader = stub.Generate(&call.context(), request);
  v1::GenerateResponse message;
  v1::Finished finished;
  while (reader->Read(&message)) {
    if (message.has_finished()) finished = message.finished();
  }
  const double us = std::chrono::duration<double, std::micro>(Clock::now() - start).count();
  const v1::Timings& timings = finished.timings();
  stream.tokens = finished.usage().completion_tokens();
  stream.call_us = us - 1e6 * (timings.queue_seconds() + timings.prefill_seconds());
  stream.decode_us = 1e6 * timings.decode_seconds();
  return reader->Finish();
}

struct Spread {
  double median, least, most;
};
Spread SpreadOf(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return {values[values.size() / 2], values.front(), values.back()};
}
nlohmann::ordered_json ToJson(const Spread& spread) {
  return {{"median", spread.median}, {"min", spread.least}, {"max", spread.most}};
}

}  // namespace

int Complete(const Options& options) {
  if (options.chat && options.token_ids) return UsageError("--chat takes a text, so not with --token_ids");
  if (!options.chat && !options.system.empty()) return UsageError("--system goes with --chat");
  const std::optional<v1::GenerateRequest> request = ToRequestWithPrompt(options);
  if (!request) return UsageError(kPromptNeeded);
  const auto stub = ConnectInference(options);
  Call call(options);
  const std::unique_ptr<grpc::ClientReader<v1::GenerateResponse>> reader = stub->Generate(&call.context(), *request);
  Printer printer(options);
  v1::GenerateResponse message;
  v1::Finished finished;
  while (reader->Read(&message)) {
    printer.Print(message);
    if (message.has_finished()) finished = message.finished();
  }
  const grpc::Status status = reader->Finish();
  if (status.ok() && (options.stats || (isatty(STDERR_FILENO) && !options.json))) PrintStats(finished);
  return ExitStatus(status);
}

int Chat(const Options& options) {
  if (!options.words.empty()) return UsageError("chat takes no words: it reads messages from standard input, a line each");
  const auto stub = ConnectInference(options);
  v1::GenerateRequest request = ToGenerateRequest(options);
  if (!options.system.empty()) AddMessage(*request.mutable_chat(), "system", options.system);
  const bool prompts = isatty(STDIN_FILENO) && isatty(STDOUT_FILENO) && !options.json;
  while (true) {
    if (prompts) std::fputs("> ", stdout), std::fflush(stdout);
    std::string line;
    if (!std::getline(std::cin, line)) break;
    if (line.empty()) continue;
    AddMessage(*request.mutable_chat(), "user", line);
    Call call(options);
    const std::unique_ptr<grpc::ClientReader<v1::GenerateResponse>> reader = stub->Generate(&call.context(), request);
    Printer printer(options);
    std::string answer;
    v1::GenerateResponse message;
    while (reader->Read(&message)) {
      printer.Print(message);
      answer += message.has_finished() ? message.finished().text() : message.delta().text();
    }
    const grpc::Status status = reader->Finish();
    if (!status.ok()) return ExitStatus(status);
    if (options.stats) PrintStats(message.finished());
    AddMessage(*request.mutable_chat(), "assistant", answer);
  }
  if (prompts) std::puts("");
  return kOk;
}

// A model that is faster than its reader has its deltas joined, so tokens are not timed as they arrive. Each round streams one token
// and then all of them: the first is what the call itself costs, the difference is what the tokens after the first cost.
int Repeat(const Options& options) {
  std::optional<v1::GenerateRequest> request = ToRequestWithPrompt(options);
  if (!request) return UsageError(kPromptNeeded);
  if (options.count.value_or(1) < 1) return UsageError("--count must be at least 1");
  if (options.max_tokens.value_or(64) < 2) return UsageError("--max_tokens must be at least 2 to time what follows the first");
  if (!options.max_tokens) request->mutable_stop()->set_max_tokens(64);
  if (!options.ignore_eos) request->mutable_stop()->set_ignore_eos(true);
  v1::GenerateRequest first = *request;
  first.mutable_stop()->set_max_tokens(1);
  const auto stub = ConnectInference(options);
  std::vector<double> token_us, engine_us, call_us;
  Stream one, all;
  for (int i = -1; i < options.count.value_or(10); ++i) {  // the first warms up
    if (const grpc::Status status = MeasureStream(options, *stub, first, one); !status.ok()) return ExitStatus(status);
    if (const grpc::Status status = MeasureStream(options, *stub, *request, all); !status.ok()) return ExitStatus(status);
    if (i < 0) continue;
    const int decoded = std::max(1, all.tokens - one.tokens);
    token_us.push_back((all.call_us - one.call_us) / decoded);
    engine_us.push_back(all.decode_us / decoded);
    call_us.push_back(one.call_us);
  }
  const Spread client = SpreadOf(token_us), engine = SpreadOf(engine_us), call = SpreadOf(call_us);
  if (options.json) {
    PrintJson({{"streams", token_us.size()},
               {"tokens", all.tokens},
               {"client_us_per_token", ToJson(client)},
               {"engine_us_per_token", ToJson(engine)},
               {"call_us", ToJson(call)},
               {"tokens_per_second", 1e6 / client.median}});
  } else {
    std::printf("%zu streams one after the other, %d tokens each; microseconds a token after the first:\n", token_us.size(), all.tokens);
    std::printf("  at this client  median %8.1f  min %8.1f  max %8.1f  (%.0f tokens/s)\n", client.median, client.least, client.most,
                1e6 / client.median);
    std::printf("  in the engine   median %8.1f  min %8.1f  max %8.1f\n", engine.median, engine.least, engine.most);
    std::printf("  and once a call median %8.1f  min %8.1f  max %8.1f\n", call.median, call.least, call.most);
  }
  return kOk;
}

}  // namespace memserve::clients
