// memserve-tokenizer: a tokenizer for itself, one line of JSON in, one out. tests/tokenizer_parity.py compares it with the
// packages.
//
//   memserve-tokenizer KIND PATH encode [special]   "text" → [ids]; special: names of special tokens give them
//   memserve-tokenizer KIND PATH decode [special]   [ids] → "text"; special: special tokens give their names
//   memserve-tokenizer KIND PATH speed SECONDS      lines of "text"; prints {"encode_mb_per_s": …, "decode_mb_per_s": …}
//   memserve-tokenizer template PATH render         {"messages": …, "add_generation_prompt": …, "variables": {…}} → "text", or
//                                                   {"error": …}
//
// KIND is sentencepiece, bpe, tiktoken or bytes; PATH is the tokenizer's file.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

#include "engine/chat_template.h"
#include "engine/tokenizer/tokenizer.h"
#include "nlohmann/json.hpp"

namespace {

using memserve::engine::Tokenizer;
using nlohmann::json;

absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const std::string& kind, const std::string& path) {
  if (kind == "sentencepiece") return memserve::engine::LoadSentencePiece(path);
  if (kind == "bpe") return memserve::engine::LoadBpe(path);
  if (kind == "tiktoken") return memserve::engine::LoadTiktoken(path);
  if (kind == "bytes") return memserve::engine::NewByteTokenizer();
  return absl::InvalidArgumentError("KIND is sentencepiece, bpe, tiktoken or bytes");
}

// Megabytes of text a second, of passes over all lines until the time is over; the best pass counts.
template <typename Work>
double MegabytesPerSecond(double seconds, double bytes, const Work& work) {
  using Clock = std::chrono::steady_clock;
  double best = 1e30;
  double spent = 0;
  while (spent < seconds) {
    const Clock::time_point begin = Clock::now();
    work();
    const double pass = std::chrono::duration<double>(Clock::now() - begin).count();
    best = std::min(best, pass);
    spent += pass;
  }
  return bytes / best / 1e6;
}

int Speed(const Tokenizer& tokenizer, double seconds) {
  std::vector<std::string> texts;
  double bytes = 0;
  for (std::string line; std::getline(std::cin, line);) {
    texts.push_back(json::parse(line).get<std::string>());
    bytes += static_cast<double>(texts.back().size());
  }
  std::vector<std::vector<int32_t>> ids(texts.size());
  size_t sink = 0;
  const double encode = MegabytesPerSecond(seconds, bytes, [&] {
    for (size_t i = 0; i < texts.size(); ++i) ids[i] = tokenizer.Encode(texts[i]).value();
  });
  const double decode = MegabytesPerSecond(seconds, bytes, [&] {
    for (const std::vector<int32_t>& line : ids) sink += tokenizer.Decode(line, false).size();
  });
  std::cout << json{{"encode_mb_per_s", encode}, {"decode_mb_per_s", decode}}.dump() << "\n";
  return sink == 0;
}

// A chat template beside jinja2: tests/chat_template_parity.py.
int Render(const std::string& path) {
  std::ifstream file(path);
  const std::string source{std::istreambuf_iterator<char>(file), {}};
  for (std::string line; std::getline(std::cin, line);) {
    const json request = json::parse(line);
    memserve::engine::jinja::Dict variables;
    for (const auto& [name, value] : request.at("variables").items()) {
      variables.emplace_back(name, memserve::engine::jinja::Value::Written(value.get<std::string>()));
    }
    memserve::engine::Chat chat = {.add_generation_prompt = request.at("add_generation_prompt")};
    for (const json& message : request.at("messages")) chat.messages.push_back({message.at("role"), message.at("content")});
    const auto parsed = memserve::engine::ChatTemplate::Parse(source, "template", std::move(variables));
    const auto rendered = parsed.ok() ? (*parsed)->Render(chat) : parsed.status();
    const json answer = rendered.ok() ? json(rendered->text) : json{{"error", std::string(rendered.status().message())}};
    std::cout << answer.dump() << "\n";
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: memserve-tokenizer KIND PATH encode|decode [special] | speed SECONDS\n");
    return 2;
  }
  if (std::string(argv[1]) == "template") return Render(argv[2]);
  const auto tokenizer = Load(argv[1], argv[2]);
  if (!tokenizer.ok()) {
    std::fprintf(stderr, "%s\n", std::string(tokenizer.status().message()).c_str());
    return 1;
  }
  const std::string mode = argv[3];
  const bool special = argc > 4 && std::string(argv[4]) == "special";
  if (mode == "speed") return Speed(**tokenizer, argc > 4 ? std::atof(argv[4]) : 1.0);
  for (std::string line; std::getline(std::cin, line);) {
    json answer;
    if (mode == "encode") {
      const auto ids = (*tokenizer)->Encode(json::parse(line).get<std::string>(), {.allow_special = special});
      if (ids.ok())
        answer = *ids;
      else
        answer = std::string(ids.status().message());
    } else {
      answer = (*tokenizer)->Decode(json::parse(line).get<std::vector<int32_t>>(), special);
    }
    std::cout << answer.dump() << "\n";
  }
  return 0;
}
