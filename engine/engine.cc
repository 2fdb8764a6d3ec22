#include "engine/engine.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <thread>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "engine/checkpoint_folder.h"
#include "engine/executor.h"
#include "engine/kv_cache.h"
#include "engine/model/load_macros.h"
#include "engine/output_stream.h"
#include "engine/request_builder.h"
#include "engine/retry_after.h"
#include "engine/scheduler.h"
#include "engine/start_plan.h"
#include "engine/start_report.h"
#include "engine/step_times.h"
#include "engine/structured/grammar_compiler.h"
#include "engine/tokenizer/tokenizer.h"
#include "engine/validate.h"
#include "engine/work_queue.h"
#include "spdlog/spdlog.h"

namespace memserve::engine {

namespace {

constexpr int kOutputThreads = 1;  // more would not keep a stream's deltas in order
constexpr size_t kMaxTasks = 64;   // questions about value tables that wait
// Of a model faster than this tokens are handed over a few at a time: a reader notices nothing, and the engine wakes nobody at
// each.
constexpr std::chrono::microseconds kOutputRest{300};

// RESOURCE_EXHAUSTED that says when to come again.
absl::Status TryLater(absl::string_view message, absl::Duration wait) {
  absl::Status status = absl::ResourceExhaustedError(message);
  SetRetryAfter(wait, &status);
  return status;
}

// A compiled grammar as its worker sends it: it is read in this process, and takes several times as much.
constexpr int64_t kMostGrammarBytes = 16 << 20;

class EngineImpl final : public Engine {
 public:
  // `config` is the one that the executor's layers refer to.
  EngineImpl(const EngineOptions& options, CheckpointFolder loaded, const StartPlan& plan, std::unique_ptr<Executor> executor,
             std::unique_ptr<const ModelConfig> config)
      : options_(options),
        model_config_(std::move(config)),
        config_(*model_config_),
        generation_(std::move(loaded.generation)),
        tokenizer_(std::move(loaded.tokenizer)),
        chat_template_(std::move(loaded.chat_template)),
        executor_(std::move(executor)),
        cache_(plan.executor.rank.kv_pages, plan.executor.rank.kv_page_size),
        most_requests_(options.max_waiting + plan.executor.rank.max_sequences),
        scheduler_({.max_batch_tokens = plan.executor.rank.max_tokens, .max_sequences = plan.executor.rank.max_sequences}, &cache_),
        step_depth_(options.step_depth > 0 ? options.step_depth : 1) {}

  void Start(ModelInfo info) {
    info_ = std::move(info);
    limits_ = {.vocab_size = config_.vocab_size,
               .max_context_tokens = info_.max_context_tokens,
               .max_prompt_bytes = options_.max_prompt_bytes,
               .has_tokenizer = tokenizer_ != nullptr,
               .chat_template = chat_template_.status(),
               .memory = config_.memory};
    output_ = std::make_unique<WorkQueue>(kOutputThreads, kOutputRest);
    tokenizing_ = std::make_unique<WorkQueue>(options_.tokenizer_threads);
    builder_.emplace(RequestContext{.options = options_,
                                    .config = config_,
                                    .generation = generation_,
                                    .tokenizer = tokenizer_.get(),
                                    .chat_template = chat_template_,
                                    .info = info_,
                                    .kv_pages = cache_.total(),
                                    .kv_page_size = cache_.page_size()});
    if (tokenizer_ != nullptr && StructuredOutputIsBuilt()) {
      grammars_ =
          std::make_unique<GrammarCompiler>(GrammarCompilerOptions{.worker = options_.grammar_worker,
                                                                   .timeout = absl::Milliseconds(options_.grammar_timeout_ms),
                                                                   .mask_timeout = grammar_mask_timeout_,
                                                                   .memory_bytes = options_.grammar_memory_bytes,
                                                                   .most_bytes = kMostGrammarBytes,
                                                                   .cache_bytes = options_.grammar_cache_bytes},
                                            [this] { return BytesOfTokens(); });
    }
    counted_since_.assign(info_.value_tables.size(), absl::Now());
    UpdateLoad();
    thread_ = std::thread([this] { Run(); });
  }

  ~EngineImpl() override {
    {
      kernels::MutexLock lock(mutex_);
      draining_ = true;
    }
    EndAll(absl::StatusCode::kUnavailable);
    grammars_.reset();
    tokenizing_.reset();
    {
      kernels::MutexLock lock(mutex_);
      stopping_ = true;
      wake_.NotifyAll();
    }
    thread_.join();
    output_.reset();
  }

  std::string Generate(GenerateRequest request, std::shared_ptr<GenerateListener> listener) override;
  std::string Score(ScoreRequest request, ScoreCallback callback) override;
  bool Cancel(const std::string& id) override;
  void Tokenize(std::string text, bool add_bos, bool allow_special,
                std::function<void(absl::StatusOr<std::vector<int32_t>>)> callback) override;
  void Detokenize(std::vector<int32_t> token_ids, bool keep_special,
                  std::function<void(absl::StatusOr<std::string>)> callback) override;
  void ReadRows(ReadRowsRequest request, std::function<void(absl::StatusOr<TableRows>)> callback) override;
  void CountRows(RowStatsRequest request, std::function<void(absl::StatusOr<RowStats>)> callback) override;
  const ModelInfo& model() const override { return info_; }
  Load load() const override {
    Load load;
    StepProfile profile;
    {
      kernels::MutexLock lock(mutex_);
      load = load_;
      load.draining = draining_;
      load.requests = static_cast<int>(registry_.size());
      load.ended_requests = ended_requests_;
      profile = step_profile_;
    }
    load.recent = profile.Summary();  // not while the engine thread waits for the lock
    return load;
  }
  absl::Status status() const override {
    kernels::MutexLock lock(mutex_);
    return failure_;
  }
  void Drain(absl::Duration limit) override;

 private:
  // Something for the engine thread to do between two steps.
  struct Task {
    std::function<bool()> run;                        // in short; true: run again after the next step
    std::function<void(const absl::Status&)> refuse;  // instead, if it cannot be run
  };

  // --- any thread
  void AddTask(Task task);
  // A control block under the request's id, or why the request cannot be taken.
  absl::StatusOr<std::shared_ptr<RequestControl>> Register(std::string id, absl::Time deadline);
  void Unregister(const std::string& id);
  void EndAll(absl::StatusCode code);
  absl::Status EndStatus(const RequestControl& control) const;
  void Submit(std::vector<std::shared_ptr<Sequence>> sequences, int64_t new_tokens);

  // --- tokenizer threads
  std::vector<std::string> BytesOfTokens() const;
  absl::Status Admit(absl::StatusOr<RequestBuilder::Built> built, absl::Time deadline, const std::function<void()>& before_it_runs);
  absl::Status CheckAdmission(int64_t prompt_tokens, absl::Time deadline) const;

  // --- engine thread
  void Run();
  bool TakeInbox();  // false: stopping, and nothing is left
  void RunTask();
  void EndMarked(absl::Time now);
  void Collect();
  void OnDrawn(const std::shared_ptr<Sequence>& sequence, const StepResult& result, size_t slot, absl::Time now);
  void OnScored(const StepPlan& plan, const StepResult& result);
  void OnContinuationScored(const std::shared_ptr<Sequence>& sequence, float logprob, bool greedy);
  void End(const std::shared_ptr<Sequence>& sequence, EngineEnd end);
  void Deliver(const std::shared_ptr<Sequence>& sequence, EngineEnd end);
  void Fail(const absl::Status& status);
  void UpdateLoad();
  void AddToProfile();

  const EngineOptions options_;
  const std::unique_ptr<const ModelConfig> model_config_;
  const ModelConfig& config_;
  const GenerationConfig generation_;
  const std::unique_ptr<Tokenizer> tokenizer_;
  const absl::StatusOr<std::unique_ptr<ChatTemplate>> chat_template_;
  const std::unique_ptr<Executor> executor_;
  ModelInfo info_;
  RequestLimits limits_;
  std::optional<RequestBuilder> builder_;

  // Engine thread only (but for the sizes of the cache, which never change).
  KvCache cache_;
  const int64_t most_requests_;
  Scheduler scheduler_;
  const int step_depth_;
  std::deque<StepPlan> in_flight_;
  StepTimes step_times_;
  absl::Time collected_;  // the step before
  int64_t cached_tokens_ = 0;
  int64_t steps_ = 0;
  int64_t prompt_tokens_ = 0;
  int64_t completion_tokens_ = 0;
  int64_t draft_tokens_ = 0;
  int64_t accepted_draft_tokens_ = 0;
  absl::Duration last_step_;
  absl::Time step_begin_;
  StepPhases phases_;  // of this step
  // What this step gives the output thread: one task for all.
  std::vector<std::function<void()>> outputs_;
  std::vector<absl::Time> counted_since_;  // of each value table

  mutable kernels::Mutex mutex_;
  kernels::CondVar wake_;     // the engine thread waits for work
  kernels::CondVar drained_;  // Drain waits for the registry to empty
  std::vector<std::shared_ptr<Sequence>> inbox_ ABSL_GUARDED_BY(mutex_);
  std::deque<Task> tasks_ ABSL_GUARDED_BY(mutex_);
  int64_t ended_requests_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::flat_hash_map<std::string, std::shared_ptr<RequestControl>> registry_ ABSL_GUARDED_BY(mutex_);
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);
  Load load_ ABSL_GUARDED_BY(mutex_);
  StepProfile step_profile_ ABSL_GUARDED_BY(mutex_);
  int64_t inbox_tokens_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::Duration prompt_token_ ABSL_GUARDED_BY(mutex_);   // what one takes
  absl::Duration between_ends_ ABSL_GUARDED_BY(mutex_);   // of requests, about
  absl::Time last_end_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();

  const absl::Duration grammar_mask_timeout_ = absl::Milliseconds(options_.grammar_mask_timeout_ms);
  std::unique_ptr<GrammarCompiler> grammars_;  // null: no tokenizer, or not built
  std::atomic<float> output_seconds_ = 0;      // of the output thread, since the last step was added to the profile
  std::unique_ptr<WorkQueue> output_;
  std::unique_ptr<WorkQueue> tokenizing_;
  std::thread thread_;
};

// ---------------------------------------------------------------- any thread

absl::StatusOr<std::shared_ptr<RequestControl>> EngineImpl::Register(std::string id, absl::Time deadline) {
  auto control = std::make_shared<RequestControl>();
  control->id = id.empty() ? absl::StrCat("memserve-", absl::Hex(RandomBits(), absl::kZeroPad16)) : std::move(id);
  control->deadline = deadline;
  control->arrival = absl::Now();
  if (deadline <= control->arrival) return absl::DeadlineExceededError("the deadline had passed on arrival");
  kernels::MutexLock lock(mutex_);
  if (!failure_.ok()) return absl::UnavailableError(failure_.message());
  if (draining_) return absl::UnavailableError("the server is draining");
  if (static_cast<int64_t>(registry_.size()) >= most_requests_) {
    return TryLater(absl::StrCat("max_waiting: ", registry_.size(), " requests are running or waiting; at most ", most_requests_, " are taken"),
                    between_ends_);
  }
  if (!registry_.emplace(control->id, control).second) {
    return absl::AlreadyExistsError(absl::StrCat("request_id: '", control->id, "' is running"));
  }
  return control;
}

void EngineImpl::Unregister(const std::string& id) {
  kernels::MutexLock lock(mutex_);
  if (registry_.erase(id) > 0) {
    ++ended_requests_;
    const absl::Time now = absl::Now();
    if (last_end_ != absl::InfinitePast()) between_ends_ += 0.1 * (now - last_end_ - between_ends_);
    last_end_ = now;
  }
  if (registry_.empty()) drained_.NotifyAll();
}

void EngineImpl::EndAll(absl::StatusCode code) {
  kernels::MutexLock lock(mutex_);
  for (const auto& [id, control] : registry_) control->End(code);
  wake_.NotifyAll();
}

bool EngineImpl::Cancel(const std::string& id) {
  kernels::MutexLock lock(mutex_);
  const auto it = registry_.find(id);
  if (it == registry_.end()) return false;
  it->second->End(absl::StatusCode::kCancelled);
  wake_.NotifyAll();
  return true;
}

void EngineImpl::Submit(std::vector<std::shared_ptr<Sequence>> sequences, int64_t new_tokens) {
  kernels::MutexLock lock(mutex_);
  inbox_tokens_ += new_tokens;
  for (std::shared_ptr<Sequence>& sequence : sequences) inbox_.push_back(std::move(sequence));
  wake_.NotifyAll();
}

std::string EngineImpl::Generate(GenerateRequest request, std::shared_ptr<GenerateListener> listener) {
  const auto refuse = [&](const absl::Status& status) {
    output_->Add([listener, status] { listener->OnFinished(status); });
    return std::string();
  };
  if (absl::Status s = Validate(request, limits_); !s.ok()) return refuse(s);
  absl::StatusOr<std::shared_ptr<RequestControl>> control = Register(request.id, request.deadline);
  if (!control.ok()) return refuse(control.status());
  const std::string id = (*control)->id;
  const auto shared = std::make_shared<const GenerateRequest>(std::move(request));
  const auto build = [this, request = shared, control = *control,
                      listener = std::move(listener)](absl::StatusOr<std::shared_ptr<const Grammar>> grammar) {
    tokenizing_->Add([this, request, control, listener, grammar = std::move(grammar)] {
      absl::Status status = grammar.status();
      if (status.ok()) {
        absl::StatusOr<RequestBuilder::Built> built =
            builder_->Build(*request, *grammar, control, listener, [this, control] { Unregister(control->id); });
        std::vector<PromptDelta> echo;
        if (request->echo && built.ok()) echo = EchoOf(built->sequences.front()->tokens, tokenizer_.get(), request->token_bytes);
        status = Admit(std::move(built), request->deadline, [&] {
          for (PromptDelta& part : echo)
            output_->Add([listener, part = std::move(part)]() mutable { listener->OnPrompt(std::move(part)); });
        });
      }
      if (status.ok()) return;
      // While its grammar was compiled it may have ended for another reason.
      if (control->end_code != 0) status = EndStatus(*control);
      output_->Add([this, control, listener, status] {
        Unregister(control->id);
        listener->OnFinished(status);
      });
    });
  };
  if (!shared->structured) {
    build(nullptr);
    return id;
  }
  const auto wanted = [control = *control] {
    if (absl::Now() >= control->deadline) control->End(absl::StatusCode::kDeadlineExceeded);
    return control->end_code == 0;
  };
  grammars_->Compile(*shared->structured, wanted, build);
  return id;
}

std::vector<std::string> EngineImpl::BytesOfTokens() const {
  std::vector<std::string> bytes(config_.vocab_size);
  for (int32_t id = 0; id < std::min(config_.vocab_size, tokenizer_->vocab_size()); ++id) {
    if (!tokenizer_->IsSpecial(id)) bytes[id] = tokenizer_->TokenBytes(id);
  }
  // What ends is no text, although its tokenizer may say so.
  for (const int32_t id : info_.eos_token_ids) {
    if (id >= 0 && id < config_.vocab_size) bytes[id].clear();
  }
  return bytes;
}

std::string EngineImpl::Score(ScoreRequest request, ScoreCallback callback) {
  const auto refuse = [&](const absl::Status& status) {
    output_->Add([callback, status] { callback(status); });
    return std::string();
  };
  if (absl::Status s = Validate(request, limits_); !s.ok()) return refuse(s);
  absl::StatusOr<std::shared_ptr<RequestControl>> control = Register(request.id, request.deadline);
  if (!control.ok()) return refuse(control.status());
  tokenizing_->Add([this, request = std::move(request), control = *control, callback = std::move(callback)]() mutable {
    const absl::Status status = Admit(builder_->Build(request, control, callback), request.deadline, [] {});
    if (status.ok()) return;
    output_->Add([this, control, callback, status] {
      Unregister(control->id);
      callback(status);
    });
  });
  return (*control)->id;
}

void EngineImpl::Tokenize(std::string text, bool add_bos, bool allow_special,
                          std::function<void(absl::StatusOr<std::vector<int32_t>>)> callback) {
  tokenizing_->Add([this, text = std::move(text), add_bos, allow_special, callback = std::move(callback)] {
    if (tokenizer_ == nullptr) return callback(absl::UnimplementedError("text: the checkpoint has no tokenizer"));
    if (static_cast<int64_t>(text.size()) > options_.max_prompt_bytes) {
      return callback(absl::InvalidArgumentError(
          absl::StrCat("text: has ", text.size(), " bytes; this server accepts ", options_.max_prompt_bytes)));
    }
    callback(builder_->TokensOf(Prompt(text), add_bos, allow_special));
  });
}

void EngineImpl::Detokenize(std::vector<int32_t> token_ids, bool keep_special,
                            std::function<void(absl::StatusOr<std::string>)> callback) {
  tokenizing_->Add([this, ids = std::move(token_ids), keep_special, callback = std::move(callback)] {
    if (tokenizer_ == nullptr) return callback(absl::UnimplementedError("token_ids: the checkpoint has no tokenizer"));
    for (size_t i = 0; i < ids.size(); ++i) {
      if (ids[i] >= 0 && ids[i] < config_.vocab_size) continue;
      return callback(absl::InvalidArgumentError(
          absl::StrCat("token_ids: id ", ids[i], " at index ", i, " is not in [0, ", config_.vocab_size, ")")));
    }
    callback(tokenizer_->Decode(ids, keep_special));
  });
}

void EngineImpl::AddTask(Task task) {
  absl::Status refused;
  {
    kernels::MutexLock lock(mutex_);
    if (!failure_.ok()) {
      refused = absl::UnavailableError(failure_.message());
    } else if (stopping_) {
      refused = absl::UnavailableError("the server is stopping");
    } else if (tasks_.size() >= kMaxTasks) {
      refused = TryLater(absl::StrCat(tasks_.size(), " questions about value tables wait; no more are taken"), absl::Seconds(1));
    } else {
      tasks_.push_back(std::move(task));
      wake_.NotifyAll();
      return;
    }
  }
  output_->Add([refuse = std::move(task.refuse), refused] { refuse(refused); });
}

void EngineImpl::ReadRows(ReadRowsRequest request, std::function<void(absl::StatusOr<TableRows>)> callback) {
  if (absl::Status s = Validate(request, config_); !s.ok()) return output_->Add([callback, s] { callback(s); });
  AddTask({.run =
               [this, request = std::move(request), callback] {
                 const int64_t table = TableOf(request.layer, config_.memory);
                 absl::StatusOr<TableRows> rows = TableRows{.dim = config_.value_dim()};
                 for (const bool experts : {false, true}) {
                   if (!rows.ok() || (experts && !config_.memory.peer_variant)) continue;
                   absl::StatusOr<std::vector<float>> values = executor_->ReadRows(table, experts, request.rows);
                   if (!values.ok())
                     rows = values.status();
                   else
                     (experts ? rows->experts : rows->values) = *std::move(values);
                 }
                 outputs_.push_back([callback, rows = std::move(rows)]() mutable { callback(std::move(rows)); });
                 return false;
               },
           .refuse = callback});
}

void EngineImpl::CountRows(RowStatsRequest request, std::function<void(absl::StatusOr<RowStats>)> callback) {
  absl::Status status = Validate(request, config_);
  if (status.ok() && !options_.count_rows) status = absl::UnimplementedError("this server counts no rows (--count_rows=false)");
  if (!status.ok()) return output_->Add([callback, status] { callback(status); });
  const int64_t table = TableOf(request.layer, config_.memory);
  auto scan = std::make_shared<RowStatsScan>(request, config_.memory.rows());
  AddTask({.run =
               [this, table, scan, reset = request.reset, callback] {
                 if (scan->next_rows() > 0) {
                   scan->Add(executor_->ReadCounts(table, scan->next_row(), scan->next_rows(), reset));
                   if (scan->next_rows() > 0) return true;
                 }
                 RowStats stats = scan->Finish();
                 const absl::Time now = absl::Now();
                 stats.since = now - counted_since_[table];
                 if (reset) counted_since_[table] = now;
                 outputs_.push_back([callback, stats = std::move(stats)]() mutable { callback(std::move(stats)); });
                 return false;
               },
           .refuse = callback});
}

void EngineImpl::Drain(absl::Duration limit) {
  const absl::Time until = absl::Now() + limit;
  {
    kernels::MutexLock lock(mutex_);
    draining_ = true;
    while (!registry_.empty() && absl::Now() < until) {
      drained_.WaitFor(mutex_, absl::ToChronoNanoseconds(std::min(until - absl::Now(), absl::Seconds(3600))));
    }
    if (registry_.empty()) return;
  }
  EndAll(absl::StatusCode::kUnavailable);
  kernels::MutexLock lock(mutex_);
  while (!registry_.empty()) drained_.Wait(mutex_);
}

// ---------------------------------------------------------------- tokenizer threads

// Hands the sequences of a request to the engine thread, if they can be taken on.
absl::Status EngineImpl::Admit(absl::StatusOr<RequestBuilder::Built> built, absl::Time deadline,
                               const std::function<void()>& before_it_runs) {
  if (!built.ok()) return built.status();
  if (absl::Status s = CheckAdmission(built->new_tokens, deadline); !s.ok()) return s;
  before_it_runs();
  Submit(std::move(built->sequences), built->new_tokens);
  return absl::OkStatus();
}

// Too much waits already, or it cannot be done in time: better said now than after the wait. What waits may change meanwhile, so this
// is a limit of what is taken on, not of what is held.
absl::Status EngineImpl::CheckAdmission(int64_t prompt_tokens, absl::Time deadline) const {
  kernels::MutexLock lock(mutex_);
  const int64_t waiting = load_.waiting_tokens + inbox_tokens_;
  if (waiting > 0 && waiting + prompt_tokens > options_.max_waiting_tokens) {
    return TryLater(absl::StrCat("max_waiting_tokens: ", waiting, " tokens of prompts wait; with ", prompt_tokens, " more there would be over ",
                                 options_.max_waiting_tokens),
                    prompt_token_ * waiting);
  }
  const absl::Duration needed = prompt_token_ * (waiting + prompt_tokens);
  if (needed > deadline - absl::Now()) {
    return absl::DeadlineExceededError(absl::StrCat("the deadline is in ", absl::FormatDuration(deadline - absl::Now()), "; the prompt of ",
                                                    prompt_tokens, " tokens, behind ", waiting, " that wait, takes about ",
                                                    absl::FormatDuration(needed)));
  }
  return absl::OkStatus();
}

// ---------------------------------------------------------------- engine thread

void EngineImpl::Run() {
  while (TakeInbox()) {
    step_begin_ = absl::Now();
    RunTask();
    EndMarked(step_begin_);
    while (static_cast<int>(in_flight_.size()) < step_depth_) {
      StepPlan plan = scheduler_.Schedule(steps_, step_begin_, step_times_);
      if (plan.batch.num_tokens() == 0) break;
      ++steps_;
      if (absl::Status s = executor_->Launch(plan.batch); !s.ok()) {
        Fail(s);
        break;
      }
      in_flight_.push_back(std::move(plan));
    }
    phases_ = {};
    if (!in_flight_.empty()) Collect();
    UpdateLoad();  // before anybody hears of an end: what he then asks is up to date
    if (!outputs_.empty()) {
      output_->Add([this, outputs = std::exchange(outputs_, {})] {
        const absl::Time begin = absl::Now();
        for (const std::function<void()>& output : outputs) output();
        output_seconds_ = output_seconds_ + static_cast<float>(absl::ToDoubleSeconds(absl::Now() - begin));
      });
    }
    AddToProfile();
  }
}

// What the step took, now that all of it is handed over.
void EngineImpl::AddToProfile() {
  if (phases_.forward == 0) return;
  const absl::Time now = absl::Now();
  phases_.hand_over = static_cast<float>(absl::ToDoubleSeconds(now - collected_));
  phases_.schedule = std::max(0.0f, static_cast<float>(absl::ToDoubleSeconds(now - step_begin_)) - phases_.step());
  phases_.output = output_seconds_.exchange(0);
  kernels::MutexLock lock(mutex_);
  step_profile_.Add(phases_);
}

bool EngineImpl::TakeInbox() {
  std::vector<std::shared_ptr<Sequence>> arrived;
  {
    kernels::MutexLock lock(mutex_);
    const bool idle = scheduler_.running() + scheduler_.waiting() == 0 && in_flight_.empty();
    while (idle && inbox_.empty() && tasks_.empty() && !stopping_) wake_.Wait(mutex_);
    if (idle && inbox_.empty() && tasks_.empty()) return false;
    arrived.swap(inbox_);
    inbox_tokens_ = 0;
  }
  for (std::shared_ptr<Sequence>& sequence : arrived) scheduler_.Add(std::move(sequence));
  return true;
}

// One, so that no step waits for long. A task that goes on keeps its place: what it looks at is not changed by another in between.
void EngineImpl::RunTask() {
  Task task;
  absl::Status failure;
  {
    kernels::MutexLock lock(mutex_);
    if (tasks_.empty()) return;
    task = std::move(tasks_.front());
    tasks_.pop_front();
    failure = failure_;
  }
  if (!failure.ok()) {
    outputs_.push_back([refuse = std::move(task.refuse), failure] { refuse(absl::UnavailableError(failure.message())); });
    return;
  }
  if (!task.run()) return;
  kernels::MutexLock lock(mutex_);
  tasks_.push_front(std::move(task));
}

absl::Status EngineImpl::EndStatus(const RequestControl& control) const {
  switch (static_cast<absl::StatusCode>(control.end_code.load())) {
    case absl::StatusCode::kUnavailable:
      return absl::UnavailableError("the server is stopping");
    case absl::StatusCode::kDeadlineExceeded:
      return absl::DeadlineExceededError("the deadline passed");
    default:
      return absl::CancelledError("the request was cancelled");
  }
}

// Obeys cancellations, deadlines and stop strings.
void EngineImpl::EndMarked(absl::Time now) {
  scheduler_.RemoveIf([&](const std::shared_ptr<Sequence>& sequence) {
    RequestControl& control = *sequence->control;
    if (now >= control.deadline) control.End(absl::StatusCode::kDeadlineExceeded);
    if (control.end_code != 0) {
      Deliver(sequence, {.status = EndStatus(control)});
      return true;
    }
    if (sequence->output != nullptr && sequence->output->stop_matched()) {
      Deliver(sequence, {.reason = FinishReason::kStop});
      return true;
    }
    return false;
  });
}

// What of the likeliest tokens belongs to a slot.
std::vector<TokenLogprob> TopLogprobsOf(const StepResult& result, size_t slot, int32_t count) {
  std::vector<TokenLogprob> top;
  const size_t most = result.top_tokens.size() / std::max<size_t>(1, result.tokens.size() + result.score_logprobs.size());
  for (int32_t r = 0; r < count; ++r) top.push_back({result.top_tokens[slot * most + r], result.top_logprobs[slot * most + r]});
  return top;
}

void EngineImpl::Collect() {
  const StepPlan plan = std::move(in_flight_.front());
  in_flight_.pop_front();
  const absl::Time launched = absl::Now();
  absl::StatusOr<StepResult> result = executor_->Collect();
  if (!result.ok()) return Fail(result.status());
  const absl::Time now = absl::Now();
  phases_.forward = static_cast<float>(result->forward_seconds + absl::ToDoubleSeconds(now - launched));
  phases_.sample = static_cast<float>(result->sample_seconds);
  last_step_ = now - std::max(step_begin_, collected_);
  collected_ = now;
  step_times_.Add(plan.work, last_step_, plan.only_decodes);
  prompt_tokens_ += plan.prompt_tokens;
  for (size_t i = 0; i < plan.traced.size(); ++i) {
    const auto& [sequence, position] = plan.traced[i];
    if (sequence->ended) continue;
    TokenTrace trace = TraceOf(*result, static_cast<int64_t>(i), plan.batch.num_traced(), sequence->trace, config_.memory);
    trace.position = static_cast<int32_t>(position);
    // A guess whose draw did not confirm it is computed again at its place, and replaced.
    trace.token_id = position < static_cast<int64_t>(sequence->tokens.size()) ? sequence->tokens[position]
                                                                              : plan.batch.token_ids[plan.batch.traced_tokens[i]];
    sequence->trace.Add(std::move(trace));
  }
  OnScored(plan, *result);
  for (size_t i = 0; i < plan.sampled.size(); ++i) {
    if (plan.sampled[i].counts()) OnDrawn(plan.sampled[i].sequence, *result, i, now);
  }
  for (const StepPlan::Draw& draw : plan.sampled) {
    Sequence& s = *draw.sequence;
    if (draw.guesses > 0 || s.guessed.empty()) continue;
    draft_tokens_ += static_cast<int64_t>(s.guessed.size());
    accepted_draft_tokens_ += s.accepted;
    s.TakeBackGuesses();
  }
}

void EngineImpl::OnDrawn(const std::shared_ptr<Sequence>& sequence, const StepResult& result, size_t slot, absl::Time now) {
  Sequence& s = *sequence;
  const int32_t token = result.tokens[slot];
  ++completion_tokens_;
  if (s.first_token == absl::InfiniteFuture()) s.first_token = now;
  std::vector<TokenTrace> traces = s.trace.TakeBefore(static_cast<int64_t>(s.tokens.size()));
  s.Append(token);
  const bool stops = std::find(s.stop_ids.begin(), s.stop_ids.end(), token) != s.stop_ids.end();
  DrawnToken drawn = {.id = token,
                      .logprob = result.logprobs[slot],
                      .top = TopLogprobsOf(result, slot, s.top_logprobs),
                      .traces = std::move(traces),
                      .stops = stops};
  if (!s.chosen_logprobs.empty()) {
    const auto begin =
        result.chosen_logprobs.begin() + static_cast<int64_t>(slot * result.chosen_logprobs.size() / result.tokens.size());
    drawn.chosen.assign(begin, begin + static_cast<int64_t>(s.chosen_logprobs.size()));
  }
  outputs_.push_back([output = s.output, drawn = std::move(drawn)]() mutable { output->OnToken(std::move(drawn)); });
  const bool full = static_cast<int64_t>(s.tokens.size()) - s.prompt_tokens >= s.max_draws;
  if (!stops && !full && !(s.rules != nullptr && s.rules->has_grammar())) return;
  if (!stops && !full) {
    const LogitRules::Match match = s.rules->MatchOf(s.tokens, s.prompt_tokens);
    if (s.rules->slowest_match() > grammar_mask_timeout_) {
      End(sequence, {.status = GrammarTooSlow(s.structured_field, grammar_mask_timeout_)});
    } else if (match == LogitRules::Match::kComplete) {
      End(sequence, {.reason = FinishReason::kStop});
    } else if (match == LogitRules::Match::kStuck) {
      End(sequence, {.status = absl::InvalidArgumentError(absl::StrCat(s.structured_field, ": after ",
                                                                       static_cast<int64_t>(s.tokens.size()) - s.prompt_tokens,
                                                                       " tokens none that would match may be drawn"))});
    }
    return;
  }
  EngineEnd end = {.reason = stops ? FinishReason::kStop : FinishReason::kLength};
  if (stops) end.stop_token_id = token;
  End(sequence, std::move(end));
}

// Scored slots of a sequence follow each other.
void EngineImpl::OnScored(const StepPlan& plan, const StepResult& result) {
  for (size_t i = 0; i < plan.scored.size();) {
    const std::shared_ptr<Sequence> sequence = plan.scored[i];
    PromptDelta prompt = {.first = static_cast<int32_t>(sequence->score_begin + sequence->scored)};
    for (; i < plan.scored.size() && plan.scored[i] == sequence && !sequence->ended; ++i) {
      const float logprob = result.score_logprobs[i];
      const int64_t at = sequence->score_begin + sequence->scored++;
      if (sequence->scores()) {
        OnContinuationScored(sequence, logprob, result.score_greedy[i] != 0);
        continue;
      }
      prompt.token_ids.push_back(sequence->tokens[at]);
      prompt.logprobs.push_back(logprob);
      if (sequence->prompt_top_logprobs > 0) {
        prompt.top_logprobs.push_back(TopLogprobsOf(result, result.tokens.size() + i, sequence->prompt_top_logprobs));
      }
    }
    while (i < plan.scored.size() && plan.scored[i] == sequence) ++i;  // it has ended
    if (prompt.token_ids.empty()) continue;
    outputs_.push_back([output = sequence->output, prompt = std::move(prompt)]() mutable { output->OnPrompt(std::move(prompt)); });
  }
}

void EngineImpl::OnContinuationScored(const std::shared_ptr<Sequence>& sequence, float logprob, bool greedy) {
  ContinuationScore& score = sequence->score->result.scores[sequence->score_index];
  score.token_logprobs.push_back(logprob);
  score.logprob += logprob;
  score.is_greedy = score.is_greedy && greedy;
  if (score.token_logprobs.size() == score.token_ids.size()) End(sequence, {});
}

void EngineImpl::End(const std::shared_ptr<Sequence>& sequence, EngineEnd end) {
  Deliver(sequence, std::move(end));
  scheduler_.Remove(sequence);
}

// Tells the output thread that a sequence has ended.
void EngineImpl::Deliver(const std::shared_ptr<Sequence>& sequence, EngineEnd end) {
  const Sequence& s = *sequence;
  cached_tokens_ += s.cached_tokens;
  if (s.output != nullptr) {
    const absl::Time now = absl::Now();
    const absl::Time begin = std::min(s.first_step, now);
    const absl::Time first_token = std::min(s.first_token, now);
    end.cached_tokens = static_cast<int32_t>(s.cached_tokens);
    if (s.drafts) {
      end.draft_tokens = s.drafts->guessed() + static_cast<int32_t>(s.guessed.size());
      end.accepted_draft_tokens = s.drafts->accepted() + static_cast<int32_t>(s.accepted);
    }
    end.timings = {.queue = begin - s.control->arrival, .prefill = first_token - begin, .decode = now - first_token};
    outputs_.push_back([output = s.output, end = std::move(end)] { output->OnEnd(end); });
    return;
  }
  ScoreState& state = *s.score;
  const bool last = --state.remaining == 0;
  // The context as a whole was cached as far as its first continuation found it so.
  if (s.score_index == 0) state.result.usage.cached_tokens = static_cast<int32_t>(s.cached_tokens);
  if (state.callback == nullptr || (end.status.ok() && !last)) return;
  // The first error ends the request; its other continuations end in silence.
  outputs_.push_back([this, control = s.control, callback = std::exchange(state.callback, nullptr), status = end.status,
                      result = end.status.ok() ? std::move(state.result) : ScoreResult()]() mutable {
    Unregister(control->id);
    if (status.ok()) callback(std::move(result));
    else callback(status);
  });
  if (!end.status.ok()) s.control->End(end.status.code());
}

// A device failed: nothing can go on.
void EngineImpl::Fail(const absl::Status& status) {
  spdlog::error("a step failed, the engine stops: {}", status.ToString());
  {
    kernels::MutexLock lock(mutex_);
    failure_ = status;
  }
  in_flight_.clear();
  scheduler_.RemoveIf([&](const std::shared_ptr<Sequence>& sequence) {
    Deliver(sequence, {.status = absl::UnavailableError(absl::StrCat("a device failed: ", status.message()))});
    return true;
  });
}

void EngineImpl::UpdateLoad() {
  kernels::MutexLock lock(mutex_);
  load_.running = scheduler_.running();
  load_.waiting = scheduler_.waiting();
  load_.preempted = scheduler_.preempted();
  load_.waiting_tokens = scheduler_.waiting_tokens();
  load_.kv_pages_total = cache_.total();
  load_.kv_pages_used = cache_.used();
  load_.kv_pages_cached = cache_.cached();
  load_.cached_tokens = cached_tokens_;
  load_.preemptions = scheduler_.preemptions();
  prompt_token_ = step_times_.PromptToken();
  load_.kv_page_size = static_cast<int>(cache_.page_size());
  load_.steps = steps_;
  load_.prompt_tokens = prompt_tokens_;
  load_.completion_tokens = completion_tokens_;
  load_.draft_tokens = draft_tokens_;
  load_.accepted_draft_tokens = accepted_draft_tokens_;
  load_.last_step = last_step_;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(const EngineOptions& options) {
  const absl::Time begin = absl::Now();
  const int64_t resident_before = ResidentBytes("VmRSS");
  absl::StatusOr<CheckpointFolder> loaded = ReadCheckpointFolder(options.checkpoint);
  if (!loaded.ok()) return loaded.status();
  const absl::Time folder_read = absl::Now();
  // The layers keep a pointer to the configuration: it moves to its final place before they are built.
  auto config = std::make_unique<ModelConfig>(loaded->model);
  absl::StatusOr<StartPlan> plan = MakeStartPlan(options, *config, *loaded->tensors);
  if (!plan.ok()) return plan.status();
  LogPlan(*plan);
  if (options.dry_run) return std::unique_ptr<Engine>();
  const absl::Time planned = absl::Now();
  absl::StatusOr<std::unique_ptr<Executor>> executor = Executor::Load(*config, *loaded->tensors, plan->executor);
  if (!executor.ok()) return executor.status();
  const absl::Time read = absl::Now();
  ModelInfo info = Describe(options, *loaded, *plan, **executor);
  loaded->tensors.reset();
  int64_t read_bytes = 0;
  for (const auto& rank : (*executor)->ranks()) read_bytes += rank->loaded().read_bytes;
  const double read_seconds = absl::ToDoubleSeconds(read - planned);
  spdlog::info("start: folder {:.3f} s, plan {:.3f} s, weights {:.3f} s ({} read and packed, {}/s); {} on {} ({} threads, {})",
               absl::ToDoubleSeconds(folder_read - begin), absl::ToDoubleSeconds(planned - folder_read), read_seconds,
               FormatBytes(read_bytes), FormatBytes(static_cast<int64_t>(static_cast<double>(read_bytes) / std::max(read_seconds, 1e-6))),
               info.name, info.backend, plan->executor.threads, info.isa);
  WarnOfNotFinite(**executor);
  spdlog::info("resident memory: {} before loading, {} now, {} at its peak (KV pages and scratch count once they are used)",
               FormatBytes(resident_before), FormatBytes(ResidentBytes("VmRSS")), FormatBytes(ResidentBytes("VmHWM")));
  auto engine = std::make_unique<EngineImpl>(options, *std::move(loaded), *plan, *std::move(executor), std::move(config));
  engine->Start(std::move(info));
  return engine;
}

}  // namespace memserve::engine
