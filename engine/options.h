// Everything that can be set about an engine: default, unit and reason beside each field. Checked once, by Engine::Create.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace memserve::engine {

struct EngineOptions {
  std::string checkpoint;            // folder with config.json, *.safetensors, tokenizer files
  std::string model_name;            // what clients call it; empty: the folder's name
  std::string backend = "cpu";       // cpu, or reference (plain loops, for tests)
  std::vector<int> devices = {0};    // one rank each; on cpu the ranks share the cores
  int threads = 0;                   // of all ranks together; 0: one per core
  std::string isa = "auto";          // instruction set to pin, by name

  std::string weight_dtype = "auto";      // f32, bf16; auto: as the checkpoint holds the trunk
  std::string activation_dtype = "auto";  // f32, bf16; auto: as the weights
  std::string table_dtype = "auto";       // f32, bf16, int8, int4; auto: as the checkpoint holds the value tables
  std::string kv_dtype = "auto";          // f32, bf16, int8; auto: f32 with f32 activations, else bf16

  int64_t kv_cache_bytes = 0;        // 0: enough for 16 sequences of full context, at most a quarter of the memory that is free
  double kv_cache_fraction = 0;      // instead: of the memory that is free beside weights, tables and scratch; (0, 1]
  int kv_page_size = 16;             // tokens; a multiple of 16
  int max_context_tokens = 0;        // prompt and completion of one request; 0: the checkpoint's max_seqlen
  int max_batch_tokens = 512;        // in one step: decode tokens first, prompt chunks fill the rest
  int max_sequences = 64;            // running at once
  int max_waiting = 1024;            // requests; more are refused
  int64_t max_waiting_tokens = 1 << 20;  // of prompts that wait, beyond the first of them; more are refused
  int64_t max_prompt_bytes = 1 << 20;  // of text, checked before it is tokenised
  bool count_rows = true;              // how often each row of the value tables is read: 4 bytes a row
  int64_t max_trace_entries = 1 << 17;  // of memory reads that one request may be told (12 bytes each)
  std::string grammar_worker;     // the program that compiles grammars; empty: memserve-grammar beside the running one, or by PATH
  int grammar_timeout_ms = 5000;  // of processor time, to compile one; what takes longer is refused
  int grammar_mask_timeout_ms = 200;        // of the engine thread's time, for one token's mask; a request that takes longer ends
  int64_t grammar_memory_bytes = 1 << 30;   // that compiling may take
  int64_t grammar_cache_bytes = 256 << 20;  // of compiled grammars that are kept
  int step_depth = 0;                // steps in flight, 1 or 2; 0: what suits the back end (cpu: 1)
  int tokenizer_threads = 1;
  int loader_threads = 0;            // 0: one per core, at most 8
  int64_t memory_limit_bytes = 0;    // what the start plan may use; 0: what the machine has free
  bool dry_run = false;              // make the plan and stop
};

}  // namespace memserve::engine
