// The commands that ask once and print one answer.
#include <cstdio>
#include <optional>
#include <string>
#include <utility>

#include "clients/call.h"
#include "clients/commands.h"
#include "clients/requests.h"

namespace memserve::clients {
namespace {

template <typename Stub, typename Request, typename Response>
grpc::Status Ask(const Options& options, const Stub& stub,
                 grpc::Status (Stub::element_type::*method)(grpc::ClientContext*, const Request&, Response*),
                 const Request& request, Response& response) {
  Call call(options);
  const grpc::Status status = ((*stub).*method)(&call.context(), request, &response);
  if (status.ok() && options.json) PrintJson(ToJson(response));
  return status;
}

// A line per field; lists of messages are a line each, indented.
void PrintFields(const nlohmann::ordered_json& message) {
  for (const auto& [name, value] : message.items()) {
    if (value.is_array() && !value.empty() && value[0].is_object()) {
      std::printf("%s:\n", name.c_str());
      for (const auto& entry : value) {
        std::string line;
        for (const auto& [key, part] : entry.items())
          line += "  " + key + " " + (part.is_string() ? part.get<std::string>() : part.dump());
        std::printf("%s\n", line.c_str());
      }
    } else {
      std::printf("%s: %s\n", name.c_str(), value.is_string() ? value.get<std::string>().c_str() : value.dump().c_str());
    }
  }
}

template <typename Stub, typename Request, typename Response>
int AskAndPrintFields(const Options& options, const Stub& stub,
                      grpc::Status (Stub::element_type::*method)(grpc::ClientContext*, const Request&, Response*)) {
  if (!options.words.empty()) return UsageError((options.command + " takes no words").c_str());
  Response response;
  const grpc::Status status = Ask(options, stub, method, Request(), response);
  if (status.ok() && !options.json) PrintFields(ToJson(response));
  return ExitStatus(status);
}

bool SetText(const Options& options, const std::string& word, auto& message) {
  std::optional<std::string> text;
  v1::TokenIds ids;
  if (!ReadPrompt(options, word, text, ids)) return false;
  if (text) {
    message.set_text(*std::move(text));
  } else {
    *message.mutable_tokens() = ids;
  }
  return true;
}

// The command's words are row numbers.
bool SetRows(const Options& options, auto& request) {
  v1::TokenIds rows;
  for (const std::string& word : options.words) {
    if (!ParseIds(word, rows)) return false;
  }
  request.mutable_rows()->Swap(rows.mutable_ids());
  return true;
}

void PrintRow(int32_t row, const char* what, const auto& values) {
  std::printf("%d\t%s", row, what);
  for (int i = 0; i < values.size(); ++i) std::printf("%s%.9g", i == 0 ? "" : " ", values.Get(i));
  std::puts("");
}

}  // namespace

int Score(const Options& options) {
  constexpr char kWordsNeeded[] = "give CONTEXT and at least one CONTINUATION (with --token_ids they are ids such as 1,2,3)";
  if (options.words.size() < 2) return UsageError(kWordsNeeded);
  v1::ScoreRequest request;
  if (!SetText(options, options.words[0], request)) return UsageError(kWordsNeeded);
  for (size_t i = 1; i < options.words.size(); ++i) {
    if (!SetText(options, options.words[i], *request.add_continuations())) return UsageError(kWordsNeeded);
  }
  if (!options.request_id.empty()) request.set_request_id(options.request_id);
  if (!options.model.empty()) request.set_model(options.model);
  if (options.add_bos) request.set_add_bos(*options.add_bos);
  *request.mutable_memory() = ToMemory(options);
  *request.mutable_scheduling() = ToScheduling(options);

  v1::ScoreResponse response;
  const grpc::Status status = Ask(options, ConnectInference(options), &v1::Inference::Stub::Score, request, response);
  for (int i = 0; !options.json && i < response.scores_size(); ++i) {
    const v1::ContinuationScore& score = response.scores(i);
    std::printf("%.4f\t%s\t%s\n", score.logprob(), score.is_greedy() ? "greedy" : "-", options.words[i + 1].c_str());
  }
  return ExitStatus(status);
}

int Tokenize(const Options& options) {
  v1::TokenizeRequest request;
  std::optional<std::string> text;
  v1::TokenIds unused;
  if (options.words.size() != 1 || !ReadPrompt(options, options.words[0], text, unused)) return UsageError("give one TEXT");
  request.set_text(*std::move(text));
  if (options.add_bos) request.set_add_bos(*options.add_bos);
  if (options.allow_special) request.set_allow_special(true);
  v1::TokenizeResponse response;
  const grpc::Status status = Ask(options, ConnectInference(options), &v1::Inference::Stub::Tokenize, request, response);
  if (status.ok() && !options.json) {
    std::string line;
    for (const int32_t id : response.token_ids()) line += (line.empty() ? "" : " ") + std::to_string(id);
    std::puts(line.c_str());
  }
  return ExitStatus(status);
}

int Detokenize(const Options& options) {
  v1::TokenIds ids;
  for (const std::string& word : options.words) {
    if (!ParseIds(word, ids)) return UsageError(("\"" + word + "\" is no token id").c_str());
  }
  if (ids.ids().empty()) return UsageError("give at least one ID");
  v1::DetokenizeRequest request;
  request.mutable_token_ids()->Swap(ids.mutable_ids());
  v1::DetokenizeResponse response;
  const grpc::Status status = Ask(options, ConnectInference(options), &v1::Inference::Stub::Detokenize, request, response);
  if (status.ok() && !options.json) std::puts(response.text().c_str());
  return ExitStatus(status);
}

int Model(const Options& options) { return AskAndPrintFields(options, ConnectInference(options), &v1::Inference::Stub::GetModel); }
int Load(const Options& options) { return AskAndPrintFields(options, ConnectInference(options), &v1::Inference::Stub::GetLoad); }
int Tables(const Options& options) { return AskAndPrintFields(options, ConnectMemory(options), &v1::Memory::Stub::GetTable); }

int Rows(const Options& options) {
  v1::GetRowsRequest request;
  if (!SetRows(options, request) || request.rows().empty()) return UsageError("give at least one ROW");
  if (options.layer) request.set_layer(*options.layer);
  v1::GetRowsResponse response;
  const grpc::Status status = Ask(options, ConnectMemory(options), &v1::Memory::Stub::GetRows, request, response);
  for (int i = 0; !options.json && i < response.rows_size(); ++i) {
    const v1::TableRow& row = response.rows(i);
    PrintRow(row.row(), "", row.values());
    if (!row.experts().empty()) PrintRow(row.row(), "experts\t", row.experts());
  }
  return ExitStatus(status);
}

int RowStats(const Options& options) {
  v1::RowStatsRequest request;
  if (!SetRows(options, request)) return UsageError("the words of row-stats are ROWs");
  if (options.layer) request.set_layer(*options.layer);
  if (options.top) request.set_top(*options.top);
  if (options.reset) request.set_reset(true);
  v1::RowStatsResponse response;
  const grpc::Status status = Ask(options, ConnectMemory(options), &v1::Memory::Stub::RowStats, request, response);
  if (!status.ok() || options.json) return ExitStatus(status);
  std::printf("reads: %llu\ndistinct_rows: %lld of %lld\nsince_seconds: %.3f\n", static_cast<unsigned long long>(response.reads()),
              static_cast<long long>(response.distinct_rows()), static_cast<long long>(response.table_rows()),
              response.since_seconds());
  for (const v1::RowCount& row : response.top()) std::printf("top\t%d\t%u\n", row.row(), row.count());
  for (const v1::RowCount& row : response.rows()) std::printf("row\t%d\t%u\n", row.row(), row.count());
  return ExitStatus(status);
}

int Trace(const Options& options) {
  v1::TraceRequest request;
  if (options.words.size() != 1 || !SetText(options, options.words[0], request)) return UsageError("give one PROMPT");
  if (!options.request_id.empty()) request.set_request_id(options.request_id);
  if (!options.model.empty()) request.set_model(options.model);
  if (options.add_bos) request.set_add_bos(*options.add_bos);
  if (options.allow_special) request.set_allow_special(true);
  *request.mutable_memory() = ToMemory(options);
  *request.mutable_scheduling() = ToScheduling(options);
  if (options.trace_entries) request.mutable_memory_trace()->set_entries(*options.trace_entries);
  if (options.trace_tokens) request.mutable_memory_trace()->set_prompt_tokens(*options.trace_tokens);
  v1::TraceResponse response;
  const grpc::Status status = Ask(options, ConnectMemory(options), &v1::Memory::Stub::Trace, request, response);
  for (int i = 0; !options.json && i < response.tokens_size(); ++i) PrintTrace(response.tokens(i));
  return ExitStatus(status);
}

int Abort(const Options& options) {
  if (options.words.empty()) return UsageError("give at least one REQUEST_ID");
  v1::AbortRequest request;
  request.mutable_request_ids()->Assign(options.words.begin(), options.words.end());
  v1::AbortResponse response;
  const grpc::Status status = Ask(options, ConnectInference(options), &v1::Inference::Stub::Abort, request, response);
  if (status.ok() && !options.json) std::printf("aborted: %d\n", response.aborted());
  return ExitStatus(status);
}

}  // namespace memserve::clients
