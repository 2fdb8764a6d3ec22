// memserve-inspect: what a checkpoint holds and what it would take to serve it. Reads no weights, but for --checksums.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "engine/inspect/inspect.h"
#include "spdlog/spdlog.h"

ABSL_FLAG(bool, json, false, "print one JSON object");
ABSL_FLAG(bool, checksums, false, "the SHA-256 of every file, compared with SHA256SUMS where the folder has it (reads all files)");
ABSL_FLAG(int, devices, 1, "devices that share the model");
ABSL_FLAG(int64_t, memory_limit_bytes, 0, "what may be held; 0: what this machine has free");
ABSL_FLAG(int64_t, kv_cache_bytes, 0, "0: enough for 16 sequences of full context, at most a quarter of the memory");
ABSL_FLAG(std::string, weight_dtype, "auto", "of weights: f32, bf16; auto: as the checkpoint holds them");
ABSL_FLAG(std::string, table_dtype, "auto", "of value tables: f32, bf16, int8, int4; auto: as the checkpoint holds them, and a line for each");

namespace {

constexpr char kUsage[] =
    "memserve-inspect CHECKPOINT [flags]\n\n"
    "Says what a checkpoint folder holds (sizes, memory layers, tokenizer) and what a machine would hold of it.\n"
    "Exit status: 0; 1 where the checkpoint is wrong (one line says what); 2 where a file is not as SHA256SUMS lists it.\n";

int Fail(absl::string_view message) {
  std::fprintf(stderr, "memserve-inspect: %.*s\n", static_cast<int>(message.size()), message.data());
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  absl::SetProgramUsageMessage(kUsage);
  for (int i = 1; i < argc; ++i) {
    if (absl::string_view(argv[i]) == "--help" || absl::string_view(argv[i]) == "-h") {
      std::fputs(kUsage, stdout);
      std::fputs("\nFlags: --json --checksums --devices=N --memory_limit_bytes=N --kv_cache_bytes=N --weight_dtype=T --table_dtype=T\n", stdout);
      return 0;
    }
  }
  const std::vector<char*> words = absl::ParseCommandLine(argc, argv);
  if (words.size() != 2) return Fail("give one CHECKPOINT folder; see --help");
  if (absl::GetFlag(FLAGS_devices) < 1 || absl::GetFlag(FLAGS_devices) > 64) return Fail("--devices must be from 1 to 64");
  spdlog::set_level(spdlog::level::off);

  memserve::engine::EngineOptions options;
  options.checkpoint = words[1];
  options.devices.clear();
  for (int device = 0; device < absl::GetFlag(FLAGS_devices); ++device) options.devices.push_back(device);
  options.memory_limit_bytes = absl::GetFlag(FLAGS_memory_limit_bytes);
  options.kv_cache_bytes = absl::GetFlag(FLAGS_kv_cache_bytes);
  options.weight_dtype = absl::GetFlag(FLAGS_weight_dtype);
  options.table_dtype = absl::GetFlag(FLAGS_table_dtype);
  const auto inspection = memserve::engine::Inspect(options, absl::GetFlag(FLAGS_checksums));
  if (!inspection.ok()) return Fail(inspection.status().message());
  if (absl::GetFlag(FLAGS_json)) {
    std::puts(inspection->dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace).c_str());
  } else {
    std::fputs(memserve::engine::FormatInspection(*inspection).c_str(), stdout);
  }
  for (const auto& file : inspection->at("files")) {
    if (file.contains("as_listed") && !file.at("as_listed").get<bool>()) return 2;
  }
  return 0;
}
