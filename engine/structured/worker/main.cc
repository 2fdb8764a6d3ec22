// memserve-grammar MEMORY_BYTES MOST_BYTES MASK_TIMEOUT_MS: compiles grammars, and tries them, for an engine, which is at the other
// end of the socket that is its standard input. A process of its own, so that one that takes too much time or memory can be killed.
// First frame: the vocabulary; then one for each grammar, answered by one.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <string>

#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "engine/structured/frame.h"
#include "engine/structured/grammar.h"

namespace memserve::engine {
namespace {

bool ReadAll(char* bytes, size_t size) {
  while (size > 0) {
    const ssize_t got = read(STDIN_FILENO, bytes, size);
    if (got <= 0) return false;
    bytes += got;
    size -= static_cast<size_t>(got);
  }
  return true;
}

bool ReadFrame(std::string* frame) {
  char head[4];
  uint32_t size = 0;
  if (!ReadAll(head, sizeof(head))) return false;
  std::string_view number(head, sizeof(head));
  TakeNumber(&number, &size);
  frame->resize(size);
  return ReadAll(frame->data(), size);
}

bool WriteFrame(GrammarAnswer answer, const std::string& text) {
  std::string bytes;
  AppendNumber(static_cast<uint32_t>(text.size() + 1), &bytes);
  bytes.push_back(static_cast<char>(answer));
  bytes += text;
  for (size_t sent = 0; sent < bytes.size();) {
    const ssize_t now = send(STDIN_FILENO, bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
    if (now <= 0) return false;
    sent += static_cast<size_t>(now);
  }
  return true;
}

bool Answer(const std::shared_ptr<const GrammarVocabulary>& vocabulary, int vocab_size, const std::string& frame, size_t most_bytes,
            absl::Duration mask_timeout) {
  const std::optional<std::vector<std::string>> texts = SplitTexts(frame);
  if (!texts || texts->size() < 2 || (*texts)[0].size() != 1) return false;
  StructuredOutput structured = {.kind = static_cast<StructuredOutput::Kind>((*texts)[0][0]), .text = (*texts)[1]};
  structured.choices.assign(texts->begin() + 2, texts->end());
  const absl::StatusOr<std::string> compiled = CompileGrammar(*vocabulary, structured);
  if (absl::IsResourceExhausted(compiled.status())) return WriteFrame(GrammarAnswer::kTooLarge, "");
  if (!compiled.ok()) return WriteFrame(GrammarAnswer::kInvalid, std::string(compiled.status().message()));
  if (compiled->size() > most_bytes) {
    return WriteFrame(GrammarAnswer::kInvalid,
                      absl::StrCat("compiles to ", compiled->size(), " bytes; at most ", most_bytes, " are accepted"));
  }
  const absl::StatusOr<std::shared_ptr<const Grammar>> grammar = ReadGrammar(vocabulary, structured.kind, *compiled);
  if (!grammar.ok()) return WriteFrame(GrammarAnswer::kTooLarge, "");
  const absl::Status tried = TryGrammar(**grammar, vocab_size, mask_timeout);
  if (absl::IsResourceExhausted(tried)) return WriteFrame(GrammarAnswer::kTooLarge, "");
  if (!tried.ok()) return WriteFrame(GrammarAnswer::kInvalid, std::string(tried.message()));
  return WriteFrame(GrammarAnswer::kCompiled, *compiled);
}

int Run(int argc, char** argv) {
  uint64_t memory_bytes = 0, most_bytes = 0;
  int64_t mask_timeout_ms = 0;
  if (argc != 4 || !absl::SimpleAtoi(argv[1], &memory_bytes) || !absl::SimpleAtoi(argv[2], &most_bytes) ||
      !absl::SimpleAtoi(argv[3], &mask_timeout_ms)) {
    std::fputs("memserve-grammar is started by memserve; it is of no use by itself\n", stderr);
    return 2;
  }
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  const rlimit memory = {memory_bytes, memory_bytes}, none = {0, 0};
  setrlimit(RLIMIT_AS, &memory);
  setrlimit(RLIMIT_CORE, &none);
  setpriority(PRIO_PROCESS, 0, 5);  // steps come first
  std::string frame;
  if (!ReadFrame(&frame)) return 0;
  const std::optional<std::vector<std::string>> tokens = SplitTexts(frame);
  if (!tokens) return 1;
  absl::StatusOr<std::unique_ptr<GrammarVocabulary>> vocabulary = GrammarVocabulary::New(*tokens);
  if (!vocabulary.ok()) {
    WriteFrame(GrammarAnswer::kInvalid, std::string(vocabulary.status().message()));
    return 1;
  }
  if (!WriteFrame(GrammarAnswer::kCompiled, "")) return 0;
  const std::shared_ptr<const GrammarVocabulary> shared = *std::move(vocabulary);
  const int vocab_size = static_cast<int>(tokens->size());
  while (ReadFrame(&frame) && Answer(shared, vocab_size, frame, most_bytes, absl::Milliseconds(mask_timeout_ms))) continue;
  return 0;
}

}  // namespace
}  // namespace memserve::engine

int main(int argc, char** argv) { return memserve::engine::Run(argc, argv); }
