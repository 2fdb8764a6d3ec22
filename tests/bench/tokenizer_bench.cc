// Megabytes of text a second, one thread. Beside the packages: tests/tokenizer_parity.py --speed.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "absl/flags/declare.h"
#include "absl/flags/flag.h"
#include "engine/tokenizer/tokenizer.h"
#include "tests/bench/operations.h"

ABSL_DECLARE_FLAG(std::string, checkpoint);
ABSL_FLAG(std::string, text_file, "", "tokenizer: what is encoded, line by line; empty: lines made here");
ABSL_FLAG(double, tokenizer_seconds, 2.0, "tokenizer: measured for so long in each direction");

namespace memserve::bench {
namespace {

using engine::Tokenizer;

std::vector<std::string> Lines(const std::string& path) {
  std::vector<std::string> lines;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) lines.push_back(line + "\n");
  const char* words[] = {"the",   "keeper", "of",     "harbour", "counts",      "340",  "boats",
                         "naïve", "東京",   "Москва", "don't",   "return x+1;", "🙂", "\n"};
  uint64_t state = 1;
  for (int i = 0; lines.size() < 5000 && path.empty(); ++i) {
    std::string& line = lines.emplace_back();
    for (int word = 0; word < 12; ++word) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      line += std::string(words[(state >> 33) % std::size(words)]) + " ";
    }
  }
  return lines;
}

// The best pass over all lines counts: what else runs here only makes one slower.
template <typename Work>
double BestSeconds(double seconds, const Work& work) {
  using Clock = std::chrono::steady_clock;
  double best = 1e30;
  for (double spent = 0; spent < seconds;) {
    const Clock::time_point begin = Clock::now();
    work();
    const double pass = std::chrono::duration<double>(Clock::now() - begin).count();
    best = std::min(best, pass);
    spent += pass;
  }
  return best;
}

}  // namespace

void BenchTokenizer() {
  const auto loaded = engine::LoadTokenizer(absl::GetFlag(FLAGS_checkpoint), "", 1 << 24);
  if (!loaded.ok() || *loaded == nullptr) {
    std::fprintf(stderr, "memserve-bench: %s\n",
                 loaded.ok() ? "--checkpoint has no tokenizer" : std::string(loaded.status().message()).c_str());
    return;
  }
  const Tokenizer& tokenizer = **loaded;
  const std::vector<std::string> lines = Lines(absl::GetFlag(FLAGS_text_file));
  std::vector<std::vector<int32_t>> ids(lines.size());
  const double seconds = absl::GetFlag(FLAGS_tokenizer_seconds);
  const double encode = BestSeconds(seconds, [&] {
    for (size_t i = 0; i < lines.size(); ++i) ids[i] = tokenizer.Encode(lines[i]).value();
  });
  size_t decoded = 0;
  const double decode = BestSeconds(seconds, [&] {
    for (const std::vector<int32_t>& line : ids) decoded += tokenizer.Decode(line, false).size();
  });
  size_t bytes = 0;
  size_t tokens = 0;
  for (size_t i = 0; i < lines.size(); ++i) {
    bytes += lines[i].size();
    tokens += ids[i].size();
  }
  std::printf("%s, %d tokens: %zu lines, %.2f MB, %zu tokens; encode %.1f MB/s (%.2f M tokens/s), decode %.1f MB/s, one thread\n",
              std::string(tokenizer.name()).c_str(), tokenizer.vocab_size(), lines.size(), static_cast<double>(bytes) / 1e6, tokens,
              static_cast<double>(bytes) / encode / 1e6, static_cast<double>(tokens) / encode / 1e6,
              static_cast<double>(bytes) / decode / 1e6);
}

}  // namespace memserve::bench
