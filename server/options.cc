#include "server/options.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/reflection.h"
#include "absl/flags/usage_config.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "spdlog/common.h"

namespace {

const memserve::server::ServerOptions kServer;
const memserve::engine::EngineOptions kEngine;

}  // namespace

ABSL_FLAG(std::string, checkpoint, kEngine.checkpoint, "folder with config.json, *.safetensors and tokenizer files (required)");
ABSL_FLAG(std::string, model_name, kEngine.model_name, "what clients call the model; empty: the checkpoint folder's name");
ABSL_FLAG(std::string, backend, kEngine.backend, "what computes: cpu, or reference (plain loops, for tests)");
ABSL_FLAG(std::vector<std::string>, devices, {"0"}, "devices by number, one rank each; on cpu the ranks share the cores");
ABSL_FLAG(int, threads, kEngine.threads, "threads of all ranks together; 0: one per core");
ABSL_FLAG(std::string, isa, kEngine.isa, "instruction set to pin, by the name that GetModel gives; auto: the best there is");
ABSL_FLAG(std::string, weight_dtype, kEngine.weight_dtype, "f32, bf16; auto: as the checkpoint holds them");
ABSL_FLAG(std::string, activation_dtype, kEngine.activation_dtype, "f32, bf16; auto: as the weights");
ABSL_FLAG(std::string, table_dtype, kEngine.table_dtype, "of value tables: f32, bf16, int8, int4; auto: as the checkpoint holds them");
ABSL_FLAG(std::string, kv_dtype, kEngine.kv_dtype,
          "of cached keys and values: f32, bf16, int8; auto: f32 with f32 activations, else bf16");
ABSL_FLAG(int64_t, kv_cache_bytes, kEngine.kv_cache_bytes,
          "bytes for cached keys and values; 0: enough for 16 sequences of full context, at most a quarter of the free memory");
ABSL_FLAG(double, kv_cache_fraction, kEngine.kv_cache_fraction,
          "instead of kv_cache_bytes: this part, at most 1, of the memory that is free beside weights, tables and scratch");
ABSL_FLAG(int, kv_page_size, kEngine.kv_page_size, "tokens of a page of that cache; a multiple of 16");
ABSL_FLAG(int, max_context_tokens, kEngine.max_context_tokens,
          "tokens, prompt and completion of one request together; 0: the checkpoint's max_seqlen");
ABSL_FLAG(int, max_batch_tokens, kEngine.max_batch_tokens, "tokens in one step");
ABSL_FLAG(int, max_sequences, kEngine.max_sequences, "sequences that run at once");
ABSL_FLAG(int, max_waiting, kEngine.max_waiting, "requests that may wait; more are refused with RESOURCE_EXHAUSTED");
ABSL_FLAG(int64_t, max_waiting_tokens, kEngine.max_waiting_tokens,
          "tokens of prompts that may wait, beyond the first; more are refused with RESOURCE_EXHAUSTED");
ABSL_FLAG(int64_t, max_prompt_bytes, kEngine.max_prompt_bytes, "bytes of one prompt's text");
ABSL_FLAG(bool, count_rows, kEngine.count_rows, "count how often each row of the value tables is read: 4 bytes a row");
ABSL_FLAG(
    int64_t, max_trace_entries, kEngine.max_trace_entries,
    "reads of value table rows that one request may be told, some 10 bytes each; clients accept messages of 4 MiB by default");
ABSL_FLAG(int, tokenizer_threads, kEngine.tokenizer_threads, "threads that encode prompts");
ABSL_FLAG(int, loader_threads, kEngine.loader_threads, "threads that read the checkpoint; 0: one per core, at most 8");
ABSL_FLAG(int64_t, memory_limit_bytes, kEngine.memory_limit_bytes,
          "bytes that weights, tables, cache and scratch may take together; 0: what the machine has free");
ABSL_FLAG(std::string, grammar_worker, kEngine.grammar_worker,
          "the program that compiles grammars of structured output; empty: memserve-grammar beside this one, or by PATH");
ABSL_FLAG(int, grammar_timeout_ms, kEngine.grammar_timeout_ms,
          "milliseconds of processor time that compiling one grammar may take; then it is refused");
ABSL_FLAG(int, grammar_mask_timeout_ms, kEngine.grammar_mask_timeout_ms,
          "milliseconds of processor time that a grammar may take to say what may come next; then its request ends");
ABSL_FLAG(int64_t, grammar_memory_bytes, kEngine.grammar_memory_bytes, "bytes that the process which compiles grammars may take");
ABSL_FLAG(int64_t, grammar_cache_bytes, kEngine.grammar_cache_bytes, "bytes of compiled grammars that are kept");
ABSL_FLAG(bool, dry_run, kEngine.dry_run, "print what would be held in memory, and stop");

ABSL_FLAG(std::string, grpc_address, kServer.grpc_address, "host:port to listen on; port 0 takes a free one");
ABSL_FLAG(bool, allow_public, kServer.allow_public, "permit an address that other machines reach; there is no authentication yet");
ABSL_FLAG(std::string, port_file, kServer.port_file, "write the bound port here, atomically, once requests are answered");
ABSL_FLAG(std::string, convert_cache, kServer.convert_cache,
          "folder that keeps conversions of checkpoints in other formats (GGUF, .pth, .distcp, …); empty: they are refused");
ABSL_FLAG(int, stall_seconds, kServer.stall_seconds,
          "seconds without a step while requests wait, after which the server is not ready (health)");
ABSL_FLAG(int, drain_seconds, kServer.drain_seconds, "seconds that what runs may go on for after SIGTERM or SIGINT");
ABSL_FLAG(int, max_message_bytes, kServer.max_message_bytes, "bytes of one request");
ABSL_FLAG(int, max_unread_bytes, kServer.max_unread_bytes,
          "bytes that one stream's reader may leave unread; then the stream ends with RESOURCE_EXHAUSTED");
ABSL_FLAG(std::string, log_level, kServer.log_level, "least level that is logged: trace, debug, info, warning, error");
ABSL_FLAG(int, log_load_seconds, kServer.log_load_seconds, "log what the engine is doing so often while it works; 0: never");
ABSL_FLAG(bool, log_json, kServer.log_json, "log one JSON object a line instead of text");

namespace memserve::server {
namespace {

constexpr absl::string_view kUsage =
    "memserve --checkpoint=DIR [flags]\n"
    "\n"
    "Serves a memory-augmented language model over gRPC (package memserve.v1; health and reflection are on).\n"
    "SIGTERM or Ctrl-C: refuses new requests, finishes what runs within --drain_seconds, ends with 0; a second one cuts that "
    "short.\n"
    "Exit status: 0 after a drain, 1 if it could not start (one line on stderr says why).\n"
    "\n"
    "  memserve --checkpoint=deploy/demo/checkpoint\n"
    "  memserve --checkpoint=DIR --grpc_address=127.0.0.1:0 --port_file=/run/memserve.port\n"
    "  memserve --checkpoint=DIR --backend=cpu --devices=0,1 --dry_run\n"
    "  memserve --flagfile=memserve.flags            (one --flag=value a line)\n";

bool IsOurs(absl::string_view file) { return absl::EndsWith(file, "server/options.cc"); }

[[noreturn]] void PrintHelpAndExit() {
  std::vector<std::pair<std::string, absl::CommandLineFlag*>> flags;
  for (const auto& [name, flag] : absl::GetAllFlags()) {
    if (IsOurs(flag->Filename())) flags.emplace_back(name, flag);
  }
  std::sort(flags.begin(), flags.end());
  std::fputs(absl::StrCat(kUsage, "\nFlags:\n").c_str(), stdout);
  for (const auto& [name, flag] : flags) {
    const std::string value = flag->DefaultValue();
    std::fputs(absl::StrCat("  --", name, value.empty() ? "" : absl::StrCat("=", value), "\n      ", flag->Help(), "\n").c_str(),
               stdout);
  }
  std::fputs("  --flagfile=FILE\n      read flags from a file, one a line\n", stdout);
  std::exit(0);
}

bool IsLoopback(absl::string_view address) {
  if (absl::StartsWith(address, "unix:")) return true;
  const absl::string_view host = address.substr(0, address.rfind(':'));
  if (host == "localhost" || host == "[::1]") return true;
  int octet = 0;
  const std::vector<absl::string_view> octets = absl::StrSplit(host, '.');
  return octets.size() == 4 && octets[0] == "127" && std::all_of(octets.begin(), octets.end(), [&](absl::string_view text) {
           return absl::SimpleAtoi(text, &octet) && octet >= 0 && octet <= 255;
         });
}

bool HasPort(absl::string_view address) {
  if (absl::StartsWith(address, "unix:")) return true;
  const size_t colon = address.rfind(':');
  int port = 0;
  return colon != absl::string_view::npos && colon > 0 && absl::SimpleAtoi(address.substr(colon + 1), &port) && port >= 0 &&
         port <= 65535;
}

absl::StatusOr<std::vector<int>> ParseDevices(const std::vector<std::string>& texts) {
  std::vector<int> devices;
  for (const std::string& text : texts) {
    int device = 0;
    if (!absl::SimpleAtoi(text, &device) || device < 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("--devices is \"", absl::StrJoin(texts, ","), "\"; it takes device numbers such as 0,1"));
    }
    devices.push_back(device);
  }
  return devices;
}

absl::Status CheckRange(absl::string_view flag, int value, int least, int most) {
  if (value >= least && value <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(flag, " is ", value, "; it must be from ", least, " to ", most));
}

}  // namespace

absl::Status Check(const ServerOptions& options) {
  if (!HasPort(options.grpc_address)) {
    return absl::InvalidArgumentError(
        absl::StrCat("--grpc_address is \"", options.grpc_address, "\"; it must be host:port with a port from 0 to 65535"));
  }
  if (!options.allow_public && !IsLoopback(options.grpc_address)) {
    return absl::InvalidArgumentError(absl::StrCat("--grpc_address is \"", options.grpc_address,
                                                   "\", which other machines reach, and there is no authentication yet; "
                                                   "take 127.0.0.1, or say --allow_public"));
  }
  if (absl::Status status = CheckRange("--drain_seconds", options.drain_seconds, 0, 86400); !status.ok()) return status;
  if (absl::Status status = CheckRange("--log_load_seconds", options.log_load_seconds, 0, 86400); !status.ok()) return status;
  if (absl::Status status = CheckRange("--stall_seconds", options.stall_seconds, 1, 86400); !status.ok()) return status;
  if (absl::Status status = CheckRange("--max_message_bytes", options.max_message_bytes, 1024, 1 << 30); !status.ok()) {
    return status;
  }
  if (absl::Status status = CheckRange("--max_unread_bytes", options.max_unread_bytes, 1024, 1 << 30); !status.ok()) return status;
  static constexpr absl::string_view kLevels[] = {"trace", "debug", "info", "warning", "error"};
  if (std::find(std::begin(kLevels), std::end(kLevels), options.log_level) == std::end(kLevels)) {
    return absl::InvalidArgumentError(
        absl::StrCat("--log_level is \"", options.log_level, "\"; it must be one of ", absl::StrJoin(kLevels, ", ")));
  }
  return absl::OkStatus();
}

absl::StatusOr<Options> ParseCommandLine(int argc, char** argv) {
  absl::FlagsUsageConfig usage;
  usage.contains_help_flags = IsOurs;
  usage.version_string = [] { return std::string("memserve " MEMSERVE_VERSION "\n"); };
  absl::SetFlagsUsageConfig(usage);
  for (int i = 1; i < argc; ++i) {
    // Abseil's own help is unsorted and ends with 1.
    const absl::string_view word = argv[i];
    if (word == "-h" || absl::StartsWith(word, "-help") || absl::StartsWith(word, "--help")) PrintHelpAndExit();
  }

  const std::vector<char*> rest = absl::ParseCommandLine(argc, argv);
  if (rest.size() > 1) {
    return absl::InvalidArgumentError(absl::StrCat("\"", rest[1], "\" is no flag; flags look like --name=value, see --help"));
  }

  Options options;
  engine::EngineOptions& engine = options.engine;
  engine.checkpoint = absl::GetFlag(FLAGS_checkpoint);
  engine.model_name = absl::GetFlag(FLAGS_model_name);
  engine.backend = absl::GetFlag(FLAGS_backend);
  absl::StatusOr<std::vector<int>> devices = ParseDevices(absl::GetFlag(FLAGS_devices));
  if (!devices.ok()) return devices.status();
  engine.devices = *std::move(devices);
  engine.threads = absl::GetFlag(FLAGS_threads);
  engine.isa = absl::GetFlag(FLAGS_isa);
  engine.weight_dtype = absl::GetFlag(FLAGS_weight_dtype);
  engine.activation_dtype = absl::GetFlag(FLAGS_activation_dtype);
  engine.table_dtype = absl::GetFlag(FLAGS_table_dtype);
  engine.kv_dtype = absl::GetFlag(FLAGS_kv_dtype);
  engine.kv_cache_bytes = absl::GetFlag(FLAGS_kv_cache_bytes);
  engine.kv_cache_fraction = absl::GetFlag(FLAGS_kv_cache_fraction);
  engine.kv_page_size = absl::GetFlag(FLAGS_kv_page_size);
  engine.max_context_tokens = absl::GetFlag(FLAGS_max_context_tokens);
  engine.max_batch_tokens = absl::GetFlag(FLAGS_max_batch_tokens);
  engine.max_sequences = absl::GetFlag(FLAGS_max_sequences);
  engine.max_waiting = absl::GetFlag(FLAGS_max_waiting);
  engine.max_waiting_tokens = absl::GetFlag(FLAGS_max_waiting_tokens);
  engine.max_prompt_bytes = absl::GetFlag(FLAGS_max_prompt_bytes);
  engine.count_rows = absl::GetFlag(FLAGS_count_rows);
  engine.max_trace_entries = absl::GetFlag(FLAGS_max_trace_entries);
  engine.tokenizer_threads = absl::GetFlag(FLAGS_tokenizer_threads);
  engine.loader_threads = absl::GetFlag(FLAGS_loader_threads);
  engine.memory_limit_bytes = absl::GetFlag(FLAGS_memory_limit_bytes);
  engine.grammar_worker = absl::GetFlag(FLAGS_grammar_worker);
  engine.grammar_timeout_ms = absl::GetFlag(FLAGS_grammar_timeout_ms);
  engine.grammar_mask_timeout_ms = absl::GetFlag(FLAGS_grammar_mask_timeout_ms);
  engine.grammar_memory_bytes = absl::GetFlag(FLAGS_grammar_memory_bytes);
  engine.grammar_cache_bytes = absl::GetFlag(FLAGS_grammar_cache_bytes);
  engine.dry_run = absl::GetFlag(FLAGS_dry_run);
  if (engine.checkpoint.empty()) return absl::InvalidArgumentError("--checkpoint is missing; it names a folder, see --help");

  ServerOptions& server = options.server;
  server.grpc_address = absl::GetFlag(FLAGS_grpc_address);
  server.allow_public = absl::GetFlag(FLAGS_allow_public);
  server.port_file = absl::GetFlag(FLAGS_port_file);
  server.drain_seconds = absl::GetFlag(FLAGS_drain_seconds);
  server.stall_seconds = absl::GetFlag(FLAGS_stall_seconds);
  server.max_message_bytes = absl::GetFlag(FLAGS_max_message_bytes);
  server.max_unread_bytes = absl::GetFlag(FLAGS_max_unread_bytes);
  server.convert_cache = absl::GetFlag(FLAGS_convert_cache);
  server.log_load_seconds = absl::GetFlag(FLAGS_log_load_seconds);
  server.log_level = absl::GetFlag(FLAGS_log_level);
  server.log_json = absl::GetFlag(FLAGS_log_json);
  if (absl::Status status = Check(server); !status.ok()) return status;
  return options;
}

}  // namespace memserve::server
