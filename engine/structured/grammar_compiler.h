// Compiles grammars on a thread of its own, in a process of its own (memserve-grammar): a grammar that explodes takes nothing but
// its time there, and fails alone. What was compiled is kept.
#pragma once

#include <atomic>
#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/structured/grammar.h"
#include "engine/structured/worker_process.h"
#include "kernels/sync.h"

namespace memserve::engine {

struct GrammarCompilerOptions {
  std::string worker;           // the program; empty: see FindWorker
  absl::Duration timeout;       // for one grammar
  absl::Duration mask_timeout;  // for one token, as it is tried
  int64_t memory_bytes = 0;     // of the worker's address space
  int64_t most_bytes = 0;       // of one compiled grammar, as the worker sends it
  int64_t cache_bytes = 0;      // of those that are kept
  size_t max_waiting = 64;      // grammars; more are refused
};

// Thread-safe.
class GrammarCompiler {
 public:
  using Callback = std::function<void(absl::StatusOr<std::shared_ptr<const Grammar>>)>;

  // `tokens` gives the bytes of each token, once the first grammar comes.
  GrammarCompiler(const GrammarCompilerOptions& options, std::function<std::vector<std::string>()> tokens);
  // What waits is answered with UNAVAILABLE.
  ~GrammarCompiler();

  // Calls back from its own thread, or at once if the grammar is kept or cannot be taken. `wanted` is asked now and then: once it
  // is false nothing more is done for it, and the answer is CANCELLED.
  void Compile(StructuredOutput structured, std::function<bool()> wanted, Callback callback);

 private:
  struct Waiting {
    StructuredOutput structured;
    std::string key;
    std::function<bool()> wanted;
    Callback callback;
  };
  struct Kept {
    std::string key;
    absl::StatusOr<std::shared_ptr<const Grammar>> grammar;
    int64_t bytes = 0;
    absl::Time until;
  };

  void Run();
  absl::StatusOr<std::shared_ptr<const Grammar>> CompileNow(const Waiting& waiting);
  bool Find(const std::string& key, absl::StatusOr<std::shared_ptr<const Grammar>>* grammar) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Keep(Kept kept) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const GrammarCompilerOptions options_;
  const std::function<std::vector<std::string>()> tokens_;
  std::shared_ptr<const GrammarVocabulary> vocabulary_;  // own thread only
  std::string vocabulary_frame_;
  std::unique_ptr<WorkerProcess> worker_;

  std::atomic<bool> closing_{false};
  kernels::Mutex mutex_;
  kernels::CondVar changed_;
  std::deque<Waiting> waiting_ ABSL_GUARDED_BY(mutex_);
  std::list<Kept> kept_ ABSL_GUARDED_BY(mutex_);  // the last used in front
  absl::flat_hash_map<std::string, std::list<Kept>::iterator> index_ ABSL_GUARDED_BY(mutex_);
  int64_t kept_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  std::thread thread_;
};

}  // namespace memserve::engine
