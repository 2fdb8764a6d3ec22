// memserve-bench OPERATION [flags]: times one operation and prints it beside what the machine allows.
#include <cstdio>
#include <string>
#include <string_view>
#include <vector>

#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "tests/bench/operations.h"

namespace {

using namespace memserve::bench;

struct Subcommand {
  std::string_view name;
  std::string_view what;
  void (*run)();
};

constexpr Subcommand kSubcommands[] = {
    {"embedding", "rows of the token embedding: --vocab --dim", BenchEmbedding},
    {"rms_norm", "residual addition and norm: --dim", BenchRmsNorm},
    {"layer_norm", "norm by mean and variance: --dim", BenchLayerNorm},
    {"rope", "rotary positions: --heads --head_dim", BenchRope},
    {"matmul", "product with a weight matrix: --n --k --format", BenchMatMul},
    {"attention", "one token (or --queries) of each of --batch sequences: --context --heads --kv_heads --head_dim --format",
     BenchAttention},
    {"silu", "the gated product of a feed-forward: --n", BenchSilu},
    {"search", "product-key search: --heads --n_keys --half_dim --knn --format", BenchSearch},
    {"gather", "weighted sums of rows of a value table: --rows --dim --bag --format", BenchGather},
    {"row_dot", "dot products with rows of a value table: --rows --dim --bag --format", BenchRowDot},
    {"count", "reads of a value table's rows, counted: --rows --bag", BenchCount},
    {"mask", "rows that a request masks, left out: --rows --bag", BenchMask},
    {"select_bags", "what traced tokens read, copied: --bag", BenchSelectBags},
    {"row_stats", "what a question for row counts takes of the engine thread between two steps", BenchRowStats},
    {"sample", "one token for each row of logits: --vocab --temperature --top_k --top_p", BenchSample},
    {"logits", "the output matrix: --vocab --dim --format", BenchLogits},
    {"table_size", "search and gather over tables of 2^14 to 2^20 rows: --heads --half_dim --knn --dim --format", BenchTableSize},
    {"tokenizer", "text to tokens and back of a checkpoint folder: --checkpoint --text_file", BenchTokenizer},
    {"model", "a checkpoint through the engine, --batch streams at once: --checkpoint --prompt --decode", BenchModel},
    {"counting", "what counting rows costs, two engines side by side: --checkpoint --prompt --decode --batch", BenchCounting},
};

std::string Usage() {
  std::string usage = "memserve-bench OPERATION [flags]\n\nOperations:\n";
  for (const Subcommand& subcommand : kSubcommands) {
    absl::StrAppend(&usage, absl::StrFormat("  %-10s %s\n", std::string(subcommand.name), std::string(subcommand.what)));
  }
  absl::StrAppend(&usage,
                  "\nThe limit is the larger of bytes at sequential read bandwidth (huge pages) and flops at the peak of float32\n"
                  "multiply-adds, both measured in the same run with the same threads. What stays in the caches can be faster.\n");
  return usage;
}

}  // namespace

int main(int argc, char** argv) {
  absl::SetProgramUsageMessage(Usage());
  const std::vector<char*> arguments = absl::ParseCommandLine(argc, argv);
  for (const Subcommand& subcommand : kSubcommands) {
    if (arguments.size() == 2 && subcommand.name == arguments[1]) {
      subcommand.run();
      return 0;
    }
  }
  std::fprintf(stderr, "%s", Usage().c_str());
  return 2;
}
