#include "engine/structured/grammar_compiler.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/retry_after.h"
#include "engine/structured/frame.h"
#include "spdlog/spdlog.h"

namespace memserve::engine {
namespace {

constexpr absl::Duration kStartTimeout = absl::Seconds(30);  // of the worker: it sorts the vocabulary
constexpr absl::Duration kKeepTimeouts =
    absl::Seconds(60);                 // the machine may have been busy; but nobody gains by asking at once again
constexpr int64_t kErrorBytes = 1024;  // about what a kept error takes, beside its key
constexpr size_t kMostMessageBytes = 1 << 16;

}  // namespace

GrammarCompiler::GrammarCompiler(const GrammarCompilerOptions& options, std::function<std::vector<std::string>()> tokens)
    : options_(options), tokens_(std::move(tokens)), thread_([this] { Run(); }) {}

GrammarCompiler::~GrammarCompiler() {
  {
    kernels::MutexLock lock(mutex_);
    closing_ = true;
    changed_.NotifyAll();
  }
  thread_.join();
}

void GrammarCompiler::Compile(StructuredOutput structured, std::function<bool()> wanted, Callback callback) {
  Waiting waiting = {.structured = std::move(structured), .wanted = std::move(wanted), .callback = std::move(callback)};
  waiting.key = JoinTexts(TextsOf(waiting.structured));
  absl::StatusOr<std::shared_ptr<const Grammar>> found;
  {
    kernels::MutexLock lock(mutex_);
    if (!Find(waiting.key, &found)) {
      if (waiting_.size() < options_.max_waiting) {
        waiting_.push_back(std::move(waiting));
        changed_.NotifyAll();
        return;
      }
      absl::Status full = absl::ResourceExhaustedError(
          absl::StrCat("structured: ", waiting_.size(), " grammars wait to be compiled; no more are taken"));
      SetRetryAfter(absl::Seconds(1), &full);
      found = full;
    }
  }
  waiting.callback(std::move(found));
}

void GrammarCompiler::Run() {
  while (true) {
    Waiting waiting;
    absl::StatusOr<std::shared_ptr<const Grammar>> found;
    bool known = false;
    {
      kernels::MutexLock lock(mutex_);
      while (waiting_.empty() && !closing_) changed_.Wait(mutex_);
      if (waiting_.empty()) return;
      waiting = std::move(waiting_.front());
      waiting_.pop_front();
      known = Find(waiting.key, &found);
    }
    if (!known) {
      found = CompileNow(waiting);
      Kept kept = {.key = waiting.key, .grammar = found, .until = absl::InfiniteFuture()};
      kept.bytes = static_cast<int64_t>(kept.key.size()) + (found.ok() ? (*found)->bytes() : kErrorBytes);
      if (absl::IsDeadlineExceeded(found.status())) {
        found = absl::InvalidArgumentError(found.status().message());
        kept.grammar = found;
        kept.until = absl::Now() + kKeepTimeouts;
      }
      kernels::MutexLock lock(mutex_);
      if (found.ok() || absl::IsInvalidArgument(found.status())) Keep(std::move(kept));
    }
    waiting.callback(std::move(found));
  }
}

absl::StatusOr<std::shared_ptr<const Grammar>> GrammarCompiler::CompileNow(const Waiting& waiting) {
  const auto wanted = [&] { return !closing_ && waiting.wanted(); };
  if (closing_) return absl::UnavailableError("the server is stopping");
  if (!waiting.wanted()) return absl::CancelledError("the request was cancelled");
  if (vocabulary_ == nullptr) {
    const std::vector<std::string> tokens = tokens_();
    absl::StatusOr<std::unique_ptr<GrammarVocabulary>> vocabulary = GrammarVocabulary::New(tokens);
    if (!vocabulary.ok()) return absl::InternalError(vocabulary.status().message());
    vocabulary_ = *std::move(vocabulary);
    vocabulary_frame_ = JoinTexts(tokens);
  }
  if (worker_ == nullptr) {
    absl::StatusOr<std::unique_ptr<WorkerProcess>> worker =
        WorkerProcess::Start(options_.worker.empty() ? FindWorker() : options_.worker,
                             {absl::StrCat(options_.memory_bytes), absl::StrCat(options_.most_bytes),
                              absl::StrCat(absl::ToInt64Milliseconds(options_.mask_timeout))});
    if (!worker.ok()) return worker.status();
    const absl::StatusOr<std::string> ready = (*worker)->Ask(vocabulary_frame_, kStartTimeout, kMostMessageBytes, wanted);
    if (!ready.ok()) {
      spdlog::error("the grammar worker does not start: {}", ready.status().ToString());
      return absl::UnavailableError("structured: the grammar worker does not start");
    }
    if ((*ready)[0] != static_cast<char>(GrammarAnswer::kCompiled)) return absl::InternalError(ready->substr(1));
    worker_ = *std::move(worker);
  }
  const std::string field = FieldOf(waiting.structured);
  const absl::StatusOr<std::string> answer =
      worker_->Ask(waiting.key, options_.timeout, static_cast<size_t>(options_.most_bytes) + kMostMessageBytes, wanted);
  if (!answer.ok()) {
    worker_.reset();
    if (absl::IsCancelled(answer.status())) return closing_ ? absl::UnavailableError("the server is stopping") : answer.status();
    if (absl::IsDeadlineExceeded(answer.status())) {
      return absl::DeadlineExceededError(absl::StrCat(field, ": takes more than ", absl::FormatDuration(options_.timeout),
                                                      " of processor time to compile and to try (--grammar_timeout_ms)"));
    }
    return absl::InvalidArgumentError(
        absl::StrCat(field, ": cannot be compiled: it is nested too deeply or needs too much memory"));
  }
  switch (static_cast<GrammarAnswer>((*answer)[0])) {
    case GrammarAnswer::kCompiled:
      return ReadGrammar(vocabulary_, waiting.structured.kind, answer->substr(1));
    case GrammarAnswer::kTooLarge:
      worker_.reset();  // what it holds may be all that it may
      return absl::InvalidArgumentError(
          absl::StrCat(field, ": needs more than ", options_.memory_bytes, " bytes to be compiled (--grammar_memory_bytes)"));
    default:
      return absl::InvalidArgumentError(absl::StrCat(field, ": ", answer->substr(1)));
  }
}

bool GrammarCompiler::Find(const std::string& key, absl::StatusOr<std::shared_ptr<const Grammar>>* grammar) {
  const auto found = index_.find(key);
  if (found == index_.end() || found->second->until < absl::Now()) return false;
  kept_.splice(kept_.begin(), kept_, found->second);
  *grammar = kept_.front().grammar;
  return true;
}

void GrammarCompiler::Keep(Kept kept) {
  const auto forget = [&](std::list<Kept>::iterator it) {
    kept_bytes_ -= it->bytes;
    index_.erase(it->key);
    kept_.erase(it);
  };
  if (const auto old = index_.find(kept.key); old != index_.end()) forget(old->second);
  kept_bytes_ += kept.bytes;
  kept_.push_front(std::move(kept));
  index_[kept_.front().key] = kept_.begin();
  while (kept_bytes_ > options_.cache_bytes) forget(std::prev(kept_.end()));
}

}  // namespace memserve::engine
