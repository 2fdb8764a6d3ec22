// The engine: a loaded checkpoint, its devices and the loop that turns requests into tokens.
//
// Thread-safe. No call blocks on the model: answers come by listeners and callbacks, on the engine's own threads. One engine thread
// owns scheduler, pages and batch; tokenising runs in a small pool, detokenising and stop strings on an output thread.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/options.h"
#include "engine/request.h"
#include "engine/step_profile.h"
#include "engine/table_queries.h"

namespace memserve::engine {

struct ValueTableInfo {
  std::string name;         // of the tensor
  std::vector<int> layers;  // that read it
  int64_t rows = 0;
  int dim = 0;
  std::string format;
  std::string placement;
  int64_t bytes = 0;        // held, over all ranks
};

// What is loaded. Constant after Create.
struct ModelInfo {
  std::string name;
  std::string architecture;
  int vocab_size = 0;
  int max_context_tokens = 0;
  int dim = 0;
  int n_layers = 0;
  int n_heads = 0;
  int n_kv_heads = 0;
  int64_t trunk_parameters = 0;
  std::vector<ValueTableInfo> value_tables;
  std::vector<int> memory_layers;
  int64_t memory_rows = 0;  // of each table
  int mem_heads = 0;        // 0 without memory layers, as mem_knn
  int mem_knn = 0;
  std::vector<int32_t> eos_token_ids;
  std::optional<int32_t> bos_token_id;
  std::string tokenizer;  // "sentencepiece", "bpe", "tiktoken", "bytes", "none"
  bool structured = false;  // structured output can be asked for
  bool chat = false;      // whether there is a chat template
  std::string backend;
  std::string isa;
  std::string weight_dtype;
  std::string activation_dtype;
  std::string kv_dtype;
  int devices = 1;
};

struct Load {
  int requests = 0;          // accepted and not ended: running, waiting or still being tokenised
  int64_t ended_requests = 0;
  int running = 0;
  int waiting = 0;
  int preempted = 0;  // of those that wait: gave their pages back
  int64_t waiting_tokens = 0;
  int64_t kv_pages_total = 0;
  int64_t kv_pages_used = 0;    // held by sequences
  int64_t kv_pages_cached = 0;  // held by none, their tokens known
  int kv_page_size = 0;
  int64_t steps = 0;
  int64_t prompt_tokens = 0;
  int64_t completion_tokens = 0;
  int64_t cached_tokens = 0;    // of prompts, taken from the prefix cache
  int64_t preemptions = 0;
  int64_t draft_tokens = 0;  // guessed
  int64_t accepted_draft_tokens = 0;
  absl::Duration last_step;
  StepSummary recent;  // what recent steps took, and what for
  bool draining = false;
};

class Engine {
 public:
  // Plans, loads and starts. INVALID_ARGUMENT: an option; NOT_FOUND, DATA_LOSS: the checkpoint; RESOURCE_EXHAUSTED: the plan does not
  // fit, and the message says what would. With options.dry_run the plan is logged and the status is OK with a null engine.
  static absl::StatusOr<std::unique_ptr<Engine>> Create(const EngineOptions& options);

  virtual ~Engine() = default;  // ends what runs with UNAVAILABLE

  // The listener's OnFinished gives every error: INVALID_ARGUMENT (names field, value, limit), RESOURCE_EXHAUSTED (queue full),
  // ALREADY_EXISTS, UNIMPLEMENTED (text without a tokenizer, a chat without a template), UNAVAILABLE (draining,
  // device failed), DEADLINE_EXCEEDED, CANCELLED.
  // Gives the id in use (drawn where request.id is empty), or "" for a request that is refused at once: its id may be another's.
  virtual std::string Generate(GenerateRequest request, std::shared_ptr<GenerateListener> listener) = 0;
  virtual std::string Score(ScoreRequest request, ScoreCallback callback) = 0;

  // Ends a request in whatever state; its pages are free by the next step, its listener hears CANCELLED. False: no such request.
  virtual bool Cancel(const std::string& id) = 0;

  virtual void Tokenize(std::string text, bool add_bos, bool allow_special,
                        std::function<void(absl::StatusOr<std::vector<int32_t>>)> callback) = 0;
  virtual void Detokenize(std::vector<int32_t> token_ids, bool keep_special,
                          std::function<void(absl::StatusOr<std::string>)> callback) = 0;

  // Between two steps; the callback gets INVALID_ARGUMENT, UNIMPLEMENTED (no memory, or rows are not counted), RESOURCE_EXHAUSTED
  // (too many such questions wait) or UNAVAILABLE (device failed). RowStats takes a few steps for each million rows.
  virtual void ReadRows(ReadRowsRequest request, std::function<void(absl::StatusOr<TableRows>)> callback) = 0;
  virtual void CountRows(RowStatsRequest request, std::function<void(absl::StatusOr<RowStats>)> callback) = 0;

  virtual const ModelInfo& model() const = 0;
  virtual Load load() const = 0;

  // OK while the engine works; else what stopped it (a device failed), and then every request gets UNAVAILABLE.
  virtual absl::Status status() const = 0;

  // Refuses new requests with UNAVAILABLE and waits until what runs has finished or `limit` has passed, then ends the rest with
  // UNAVAILABLE. Blocks the caller; may be called again with a shorter limit from another thread.
  virtual void Drain(absl::Duration limit) = 0;
};

}  // namespace memserve::engine
