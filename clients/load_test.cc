// Measures a server under load: closed loop (so many streams at all times), open loop (Poisson arrivals, whatever the server does),
// and what a long prompt does to streams that run.
#include <sys/resource.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "clients/call.h"
#include "clients/commands.h"
#include "clients/load_streams.h"
#include "clients/requests.h"

namespace memserve::clients {
namespace {

using nlohmann::ordered_json;
using Seconds = std::chrono::duration<double>;

constexpr int kMostStreams = 16384;  // at once: beyond it the client would measure itself
constexpr double kWarmUpShare = 0.2;

double SecondsBetween(LoadClock::time_point from, LoadClock::time_point to) { return Seconds(to - from).count(); }

double CpuSeconds() {
  rusage used{};
  getrusage(RUSAGE_SELF, &used);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
  };
  return seconds(used.ru_utime) + seconds(used.ru_stime);
}

// Percentiles of milliseconds; null where nothing was measured.
class Percentiles {
 public:
  void Add(double ms) { values_.push_back(ms), sorted_ = false; }
  bool empty() const { return values_.empty(); }
  double At(double share) {
    if (values_.empty()) return 0;
    if (!sorted_) std::sort(values_.begin(), values_.end()), sorted_ = true;
    return values_[std::min(values_.size() - 1, static_cast<size_t>(share * static_cast<double>(values_.size())))];
  }
  ordered_json ToJson() {
    if (values_.empty()) return nullptr;
    return {{"p50", At(0.5)}, {"p95", At(0.95)}, {"p99", At(0.99)}, {"max", At(1)}};
  }

 private:
  std::vector<double> values_;
  bool sorted_ = false;
};

// The requests of a run, one after the other, the same for the same flags.
class Requests {
 public:
  Requests(const Options& options, int vocab_size) : options_(options), random_(options.seed.value_or(1)), ids_(0, vocab_size - 1) {
    base_ = ToGenerateRequest(options);
    base_.mutable_sampling()->clear_seed();
    for (int i = 0; i < options.shared_prefix_tokens.value_or(0); ++i) prefix_.push_back(ids_(random_));
  }

  // False: the file cannot be read, or has no lines.
  bool ReadPrompts() {
    std::ifstream file(options_.prompts_file);
    for (std::string line; std::getline(file, line);) {
      if (!line.empty()) lines_.push_back(line);
    }
    return !lines_.empty();
  }

  v1::GenerateRequest Next() {
    const std::lock_guard lock(mutex_);
    v1::GenerateRequest request = base_;
    request.mutable_sampling()->set_seed(random_());
    if (!lines_.empty()) {
      request.set_text(lines_[next_line_++ % lines_.size()]);
      return request;
    }
    AddIds(Spread(options_.prompt_tokens.value_or(64)), request);
    request.mutable_stop()->set_max_tokens(options_.max_tokens.value_or(Spread(options_.output_tokens.value_or(64))));
    request.mutable_stop()->set_ignore_eos(options_.ignore_eos.value_or(true));
    return request;
  }

  // Of just so many tokens, drawing on until `output_tokens` are drawn (0: until the context is full).
  v1::GenerateRequest OfLength(int prompt_tokens, int output_tokens) {
    const std::lock_guard lock(mutex_);
    v1::GenerateRequest request = base_;
    request.mutable_sampling()->set_seed(random_());
    AddIds(prompt_tokens, request);
    if (output_tokens > 0) request.mutable_stop()->set_max_tokens(output_tokens);
    request.mutable_stop()->set_ignore_eos(true);
    return request;
  }

  // Seconds until the next arrival.
  double NextGap(double rate) {
    const std::lock_guard lock(mutex_);
    return std::exponential_distribution<double>(rate)(random_);
  }

 private:
  int Spread(int mean) { return std::max(1, std::uniform_int_distribution<int>(mean - mean / 2, mean + mean / 2)(random_)); }
  void AddIds(int count, v1::GenerateRequest& request) {
    auto& ids = *request.mutable_tokens()->mutable_ids();
    ids.Add(prefix_.begin(), prefix_.end());
    for (int i = 0; i < count; ++i) ids.Add(ids_(random_));
  }

  const Options& options_;
  std::mutex mutex_;
  std::mt19937_64 random_;
  std::uniform_int_distribution<int32_t> ids_;
  v1::GenerateRequest base_;
  std::vector<int32_t> prefix_;
  std::vector<std::string> lines_;
  size_t next_line_ = 0;
};

// What one point gathers, and what it comes to. Figures are of the window: tokens that arrived within it, requests that began in
// it.
class Point {
 public:
  explicit Point(const Options& options) : options_(options) {}

  void Begin() { begin_ = LoadClock::now(), cpu_begin_ = CpuSeconds(); }
  void SetWindow(LoadClock::time_point from, LoadClock::time_point to) { from_ = from, to_ = to; }
  void Add(const StreamTimes& stream) {
    const std::lock_guard lock(mutex_);
    streams_.push_back(stream);
  }

  LoadClock::time_point begin() const { return begin_; }
  double requests_per_second() const { return requests_per_second_; }
  const ordered_json& json() const { return json_; }

  // After the last stream.
  void Finish(ordered_json what) {
    const LoadClock::time_point end = LoadClock::now();
    const double cpu = (CpuSeconds() - cpu_begin_) / SecondsBetween(begin_, end);
    int done = 0, refused = 0, expired = 0, failed = 0, good = 0, cached = 0, prompt = 0;
    int64_t tokens = 0, good_tokens = 0;
    double finished_in_window = 0;
    std::string failure;
    for (const StreamTimes& stream : streams_) {
      const bool in_window = stream.begin >= from_ && stream.begin < to_;
      const double total_ms = 1e3 * SecondsBetween(stream.begin, stream.end);
      const grpc::StatusCode code = stream.status.error_code();
      int64_t tokens_in_window = 0;
      for (const StreamTimes::Message& message : stream.messages) {
        if (message.at >= from_ && message.at < to_) tokens_in_window += message.tokens;
      }
      tokens += tokens_in_window;
      if (code == grpc::StatusCode::RESOURCE_EXHAUSTED && stream.messages.empty()) {
        ++refused;
        refusal_ms_.Add(total_ms);
        if (stream.retry_after_ms) retry_after_ms_.Add(*stream.retry_after_ms);
      } else if (code == grpc::StatusCode::DEADLINE_EXCEEDED) {
        ++expired;
        if (stream.messages.empty() && options_.timeout_seconds && total_ms < 500 * *options_.timeout_seconds)
          refusal_ms_.Add(total_ms);
      } else if (code != grpc::StatusCode::OK || !stream.finished || stream.messages.empty()) {
        ++failed;
        failure = std::to_string(code) + " " + stream.status.error_message();
      } else {
        ++done;
        prompt += stream.finished->usage().prompt_tokens();
        cached += stream.finished->usage().cached_tokens();
        const double ttft = 1e3 * SecondsBetween(stream.begin, stream.messages.front().at);
        const int later = std::max(1, stream.tokens() - stream.messages.front().tokens);
        const double itl = 1e3 * SecondsBetween(stream.messages.front().at, stream.messages.back().at) / later;
        const bool is_good = ttft <= options_.ttft_slo_ms.value_or(INFINITY) && itl <= options_.itl_slo_ms.value_or(INFINITY);
        if (is_good) ++good, good_tokens += tokens_in_window;
        // A share of a request for its share of tokens in the window: whole requests would make figures of few requests jump.
        finished_in_window += static_cast<double>(tokens_in_window) / stream.tokens();
        if (!in_window) continue;
        ttft_ms_.Add(ttft);
        total_ms_.Add(total_ms);
        queue_ms_.Add(1e3 * stream.finished->timings().queue_seconds());
        for (size_t i = 1; i < stream.messages.size(); ++i) {
          gap_ms_.Add(1e3 * SecondsBetween(stream.messages[i - 1].at, stream.messages[i].at));
        }
        if (stream.tokens() > 1) token_ms_.Add(itl);
      }
    }
    const double window = SecondsBetween(from_, std::min(to_, end));
    requests_per_second_ = finished_in_window / window;
    json_ = std::move(what);
    json_["sent"] = streams_.size();
    json_["done"] = done;
    json_["good"] = good;
    json_["refused"] = refused;
    json_["expired"] = expired;
    json_["failed"] = failed;
    if (failed > 0) json_["failure"] = failure;
    json_["window_seconds"] = window;
    json_["requests_per_second"] = requests_per_second_;
    json_["output_tokens_per_second"] = static_cast<double>(tokens) / window;
    json_["goodput_tokens_per_second"] = static_cast<double>(good_tokens) / window;
    json_["cached_share"] = prompt == 0 ? 0.0 : static_cast<double>(cached) / prompt;
    json_["ttft_ms"] = ttft_ms_.ToJson();
    json_["gap_ms"] = gap_ms_.ToJson();
    json_["token_ms"] = token_ms_.ToJson();
    json_["end_to_end_ms"] = total_ms_.ToJson();
    json_["queue_ms"] = queue_ms_.ToJson();
    json_["refusal_ms"] = refusal_ms_.ToJson();
    json_["retry_after_ms"] = retry_after_ms_.ToJson();
    json_["client_cores"] = cpu;
  }

 private:
  const Options& options_;
  std::mutex mutex_;
  std::vector<StreamTimes> streams_;
  LoadClock::time_point begin_, from_, to_ = LoadClock::time_point::max();
  double cpu_begin_ = 0;
  double requests_per_second_ = 0;
  Percentiles ttft_ms_, gap_ms_, token_ms_, total_ms_, queue_ms_, refusal_ms_, retry_after_ms_;
  ordered_json json_;
};

void PrintHead() {
  std::printf("%-14s %6s %6s %5s %5s %8s %8s %8s | %24s | %32s | %9s | %22s | %s\n", "load", "sent", "refus", "exp", "fail",
              "req/s", "tok/s", "good t/s", "TTFT ms p50/95/99", "gap ms p50/95/99/max", "total p50", "refusal ms p50/99/max",
              "client cores");
}

std::string Cells(const ordered_json& percentiles, std::initializer_list<const char*> which) {
  std::string text;
  for (const char* key : which) {
    char cell[32];
    std::snprintf(cell, sizeof cell, "%s%.1f", text.empty() ? "" : " ",
                  percentiles.is_null() ? 0.0 : percentiles.at(key).get<double>());
    text += percentiles.is_null() ? (text.empty() ? "-" : "") : cell;
  }
  return text;
}

void PrintPoint(const std::string& name, const ordered_json& point) {
  const auto number = [&](const char* key) { return point.at(key).get<double>(); };
  std::printf("%-14s %6.0f %6.0f %5.0f %5.0f %8.1f %8.0f %8.0f | %24s | %32s | %9s | %22s | %.2f\n", name.c_str(), number("sent"),
              number("refused"), number("expired"), number("failed"), number("requests_per_second"),
              number("output_tokens_per_second"), number("goodput_tokens_per_second"),
              Cells(point.at("ttft_ms"), {"p50", "p95", "p99"}).c_str(),
              Cells(point.at("gap_ms"), {"p50", "p95", "p99", "max"}).c_str(), Cells(point.at("end_to_end_ms"), {"p50"}).c_str(),
              Cells(point.at("refusal_ms"), {"p50", "p99", "max"}).c_str(), number("client_cores"));
  if (point.contains("failure")) std::printf("  the last failure: %s\n", point.at("failure").get<std::string>().c_str());
  std::fflush(stdout);
}

// So many streams at all times: who ends is followed at once.
void RunClosed(const Options& options, Requests& requests, int concurrency, Point& point) {
  LoadStreams streams(options);
  const int64_t limit = options.requests.value_or(options.seconds ? INT32_MAX : 4 * concurrency);
  std::mutex mutex;
  int64_t begun = 0;
  point.Begin();
  const LoadClock::time_point until =
      options.seconds ? point.begin() + std::chrono::duration_cast<LoadClock::duration>(Seconds(*options.seconds))
                      : LoadClock::time_point::max();
  if (options.seconds)
    point.SetWindow(point.begin() + std::chrono::duration_cast<LoadClock::duration>(Seconds(kWarmUpShare * *options.seconds)),
                    until);
  const auto may_begin = [&] {
    const std::lock_guard lock(mutex);
    return begun < limit && LoadClock::now() < until && (++begun, true);
  };
  std::function<void(const StreamTimes&)> on_done = [&](const StreamTimes& stream) {
    point.Add(stream);
    // A server that refuses or fails at once must not be asked in a busy loop.
    if (!stream.status.ok()) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    if (may_begin()) streams.Start(requests.Next(), on_done);
  };
  for (int i = 0; i < concurrency && may_begin(); ++i) streams.Start(requests.Next(), on_done);
  streams.WaitUntilNoneRun();
}

// Arrivals at random times, whatever the server does. Returns false where more streams were open than a client can tell apart.
bool RunOpen(const Options& options, Requests& requests, double rate, Point& point) {
  LoadStreams streams(options);
  const double seconds = options.seconds.value_or(10);
  point.Begin();
  const LoadClock::time_point begin = point.begin();
  const auto after = [&](double s) { return begin + std::chrono::duration_cast<LoadClock::duration>(Seconds(s)); };
  point.SetWindow(after(kWarmUpShare * seconds), after(seconds));
  for (double at = requests.NextGap(rate); at < seconds; at += requests.NextGap(rate)) {
    const v1::GenerateRequest request = requests.Next();
    std::this_thread::sleep_until(after(at));
    if (streams.running() >= kMostStreams) return false;
    streams.Start(request, [&point](const StreamTimes& stream) { point.Add(stream); });
  }
  std::this_thread::sleep_until(after(seconds));
  streams.WaitUntilNoneRun();
  return true;
}

// Gaps between the messages of one stream, from one time on.
void AddGaps(const StreamTimes& stream, LoadClock::time_point from, LoadClock::time_point to, Percentiles& gaps) {
  for (size_t i = 1; i < stream.messages.size(); ++i) {
    const LoadClock::time_point at = stream.messages[i].at;
    if (at >= from && stream.messages[i - 1].at < to) gaps.Add(1e3 * SecondsBetween(stream.messages[i - 1].at, at));
  }
}

// Streams run; a long prompt arrives: how long does one of them hear nothing until its first token is there?
int RunLongPrompt(const Options& options, Requests& requests, ordered_json& report) {
  const int count = options.streams.value_or(8);
  const int prompt_tokens = options.prompt_tokens.value_or(64);
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<StreamTimes> ended;
  std::vector<LoadClock::time_point> heard(count);  // when each had enough tokens to know its step
  constexpr size_t kWarmMessages = 100;
  int warm = 0;
  std::optional<StreamTimes> long_one;
  LoadClock::time_point first_token;
  LoadStreams streams(options);
  for (int i = 0; i < count; ++i) {
    streams.Start(
        requests.OfLength(prompt_tokens, options.output_tokens.value_or(0)),
        [&](const StreamTimes& stream) {
          const std::lock_guard lock(mutex);
          ended.push_back(stream);
          changed.notify_all();
        },
        [&](const StreamTimes& stream) {
          if (stream.messages.size() != kWarmMessages) return;
          const std::lock_guard lock(mutex);
          ++warm;
          changed.notify_all();
        });
  }
  std::unique_lock lock(mutex);
  changed.wait(lock, [&] { return warm == count || !ended.empty(); });
  const LoadClock::time_point sent = LoadClock::now();
  bool enough = ended.empty();
  if (enough) {
    lock.unlock();
    v1::GenerateRequest long_request = requests.OfLength(*options.long_prompt_tokens, 1);
    // Computed in full, also by a server that was asked the same before.
    long_request.mutable_scheduling()->set_prefix_cache(options.prefix_cache.value_or(false));
    streams.Start(long_request, [&](const StreamTimes& stream) {
      const std::lock_guard lock(mutex);
      long_one = stream;
      changed.notify_all();
    });
    lock.lock();
    changed.wait(lock, [&] { return long_one.has_value(); });
    enough = ended.empty();
  }
  lock.unlock();
  const LoadClock::time_point done = LoadClock::now();
  std::this_thread::sleep_for(std::chrono::milliseconds(50));  // the gap that was open then is closed
  streams.CancelAll();
  streams.WaitUntilNoneRun();
  const auto fail = [](const grpc::Status& status) {
    std::fprintf(stderr, "memserve-client: a stream ended before the long prompt had its first token: %s\n",
                 status.ok() ? "the context, or --output_tokens, is too short" : status.error_message().c_str());
    return kRpcError;
  };
  if (long_one && !long_one->status.ok()) return fail(long_one->status);
  if (!enough) return fail(ended.front().status);
  Percentiles before, during;
  for (const StreamTimes& stream : ended) {
    const LoadClock::time_point warm_from = stream.messages[kWarmMessages / 5].at;
    AddGaps(stream, warm_from, sent, before);
    AddGaps(stream, sent, done, during);
  }
  const double step = before.At(0.5), largest = during.At(1);
  report = {{"mode", "long_prompt"},
            {"streams", count},
            {"long_prompt_tokens", *options.long_prompt_tokens},
            {"step_ms", step},
            {"gap_before_ms", before.ToJson()},
            {"gap_during_ms", during.ToJson()},
            {"ratio", largest / step},
            {"long_prompt_ttft_ms", 1e3 * SecondsBetween(long_one->begin, long_one->messages.front().at)}};
  if (!options.json) {
    std::printf(
        "%d streams, median step %.2f ms; while a prompt of %d tokens was computed (%.0f ms): gaps p50 %.2f, p99 %.2f, largest "
        "%.2f ms\n",
        count, step, *options.long_prompt_tokens, report.at("long_prompt_ttft_ms").get<double>(), during.At(0.5), during.At(0.99),
        largest);
    std::printf("largest gap / median step: %.2f (p99 before it came: %.2f)\n", largest / step, before.At(0.99) / step);
  } else {
    PrintJson(report);
  }
  return kOk;
}

bool AllPositive(const std::vector<double>& values) {
  return std::all_of(values.begin(), values.end(), [](double value) { return value > 0 && std::isfinite(value); });
}

const char* WhatIsWrong(const Options& options) {
  if (!options.words.empty()) return "load_test takes no words";
  if (!AllPositive(options.concurrency) || !AllPositive(options.rates) || !AllPositive(options.load_factors)) {
    return "--concurrency, --rates and --load_factors must be more than 0";
  }
  for (const double concurrency : options.concurrency) {
    if (concurrency != std::floor(concurrency) || concurrency > kMostStreams)
      return "--concurrency must be whole numbers, at most 16384";
  }
  for (const auto& [value, least] : {std::pair(options.requests, 1),
                                     {options.prompt_tokens, 1},
                                     {options.output_tokens, 1},
                                     {options.shared_prefix_tokens, 0},
                                     {options.long_prompt_tokens, 1},
                                     {options.streams, 1}}) {
    if (value && (*value < least || *value > 1'000'000)) return "--requests, --…_tokens and --streams must be from 1 to 1000000";
  }
  for (const auto& value : {options.seconds, options.capacity, options.ttft_slo_ms, options.itl_slo_ms}) {
    if (value && !(*value > 0 && *value < 1e6)) return "--seconds, --capacity and --…_slo_ms must be more than 0 and below 1e6";
  }
  if (options.streams && !options.long_prompt_tokens) return "--streams goes with --long_prompt_tokens";
  return nullptr;
}

std::string NameOf(const char* kind, double value) {
  char name[48];
  std::snprintf(name, sizeof name, "%s %g", kind, value);
  return name;
}

}  // namespace

int LoadTest(const Options& options) {
  if (const char* wrong = WhatIsWrong(options)) return UsageError(wrong);
  v1::GetModelResponse model;
  {
    const auto stub = ConnectInference(options);
    Call call(options);
    if (const grpc::Status status = stub->GetModel(&call.context(), {}, &model); !status.ok()) return ExitStatus(status);
  }
  Requests requests(options, model.vocab_size());
  if (!options.prompts_file.empty() && !requests.ReadPrompts())
    return UsageError("--prompts: the file cannot be read, or has no lines");

  ordered_json report = {{"model", model.model()}, {"points", ordered_json::array()}};
  const auto write_report = [&] {
    if (options.json_file.empty()) return kOk;
    std::ofstream file(options.json_file);
    file << report.dump(2) << "\n";
    return file.good() ? kOk : UsageError("--json_file cannot be written");
  };
  if (options.long_prompt_tokens) {
    ordered_json point;
    const int status = RunLongPrompt(options, requests, point);
    report["points"].push_back(point);
    return status == kOk ? write_report() : status;
  }

  if (!options.json) PrintHead();
  const auto tell = [&](const std::string& name, const Point& point) {
    report["points"].push_back(point.json());
    if (options.json)
      PrintJson(point.json());
    else
      PrintPoint(name, point.json());
  };
  double capacity = options.capacity.value_or(0);
  std::vector<double> concurrencies = options.concurrency;
  if (concurrencies.empty() && options.rates.empty() && !options.capacity) concurrencies = {1, 4, 16, 64};
  for (const double concurrency : concurrencies) {
    Point point(options);
    RunClosed(options, requests, static_cast<int>(concurrency), point);
    point.Finish({{"mode", "closed"}, {"concurrency", static_cast<int>(concurrency)}});
    if (!options.capacity) capacity = std::max(capacity, point.requests_per_second());
    tell(NameOf("streams", concurrency), point);
  }
  if (!options.load_factors.empty() && capacity <= 0)
    return UsageError("--load_factors: no request was done, so there is no capacity");
  report["capacity_requests_per_second"] = capacity;
  std::vector<std::pair<std::string, double>> rates;
  for (const double rate : options.rates) rates.emplace_back(NameOf("rate", rate), rate);
  for (const double factor : options.load_factors) rates.emplace_back(NameOf("capacity ×", factor), factor * capacity);
  for (const auto& [name, rate] : rates) {
    Point point(options);
    if (!RunOpen(options, requests, rate, point))
      return UsageError("more than 16384 streams were open: the server neither answers nor refuses");
    ordered_json what = {{"mode", "open"}, {"offered_requests_per_second", rate}};
    if (capacity > 0) what["load_factor"] = rate / capacity;
    point.Finish(std::move(what));
    tell(name, point);
  }
  return write_report();
}

}  // namespace memserve::clients
