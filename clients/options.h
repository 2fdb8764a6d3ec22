// What the command line asks for. Unset parameters are left to the server.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace memserve::clients {

struct Options {
  std::string command;
  std::vector<std::string> words;  // after the command

  std::string address = "127.0.0.1:50051";
  std::optional<double> timeout_seconds;
  bool json = false;

  std::optional<bool> add_bos;
  bool token_ids = false;  // prompts are ids, and ids are printed

  std::string model;
  std::string request_id;
  std::optional<bool> memory;
  std::optional<int32_t> memory_knn;
  std::vector<int32_t> memory_layers, masked_rows;
  std::optional<int32_t> priority;
  std::optional<bool> prefix_cache;
  std::string cache_salt;

  std::optional<int32_t> max_tokens;
  std::optional<float> temperature;
  std::optional<int32_t> top_k;
  std::optional<float> top_p;
  std::optional<uint64_t> seed;
  std::optional<float> min_p, typical_p, repetition_penalty, presence_penalty, frequency_penalty;
  std::optional<int32_t> min_tokens, top_logprobs, prompt_logprobs;
  std::vector<std::string> stop, bad_words;
  bool include_stop = false;
  bool echo = false;
  std::optional<int32_t> n, best_of, truncate_prompt;
  std::optional<int32_t> speculate;  // guesses in one step
  std::optional<bool> ignore_eos;

  std::optional<std::string> json_schema, regex, grammar;  // contents
  bool any_json = false;
  std::vector<std::string> choice;

  bool logprobs = false;
  bool trace = false;                    // complete: the rows that fired
  std::optional<int32_t> trace_entries;  // and of trace: for each memory head
  std::optional<int32_t> trace_tokens;   // and of trace: so many

  std::optional<int32_t> layer, top;  // of rows, row-stats
  bool reset = false;
  bool stats = false;

  std::optional<int32_t> count;  // of repeat

  // Of load_test.
  std::vector<double> concurrency, rates, load_factors;
  std::optional<int32_t> requests, prompt_tokens, output_tokens, shared_prefix_tokens, long_prompt_tokens, streams;
  std::optional<double> seconds, capacity, ttft_slo_ms, itl_slo_ms;
  std::string prompts_file, json_file;

  bool chat = false;   // complete: the prompt is a user's message
  std::string system;  // the first message of a chat
  bool allow_special = false;
};

}  // namespace memserve::clients
