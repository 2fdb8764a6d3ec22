#include "engine/tokenizer/regex.h"

#include <chrono>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

namespace memserve::engine {
namespace {

// A pattern without nested repetition backtracks at most once over a run of characters; these leave it room and stop the others.
constexpr uint32_t kMatchLimit = 20'000'000;
constexpr uint32_t kHeapLimitKib = 64 << 10;
constexpr size_t kJitStackBytes = 4 << 20;
constexpr std::chrono::seconds kTimeLimit(20);  // of one text

// What a match needs beside the pattern; one for each thread.
struct Scratch {
  Scratch()
      : data(pcre2_match_data_create(1, nullptr)),
        context(pcre2_match_context_create(nullptr)),
        stack(pcre2_jit_stack_create(32 << 10, kJitStackBytes, nullptr)) {
    pcre2_set_match_limit(context, kMatchLimit);
    pcre2_set_heap_limit(context, kHeapLimitKib);
    pcre2_jit_stack_assign(context, nullptr, stack);
  }
  ~Scratch() {
    pcre2_jit_stack_free(stack);
    pcre2_match_context_free(context);
    pcre2_match_data_free(data);
  }
  pcre2_match_data* const data;
  pcre2_match_context* const context;
  pcre2_jit_stack* const stack;
};

Scratch& TheScratch() {
  thread_local Scratch scratch;
  return scratch;
}

std::string ErrorText(int code) {
  PCRE2_UCHAR text[256];
  pcre2_get_error_message(code, text, sizeof(text));
  return reinterpret_cast<const char*>(text);
}

// PCRE2's \s has U+180E, which is no white space since Unicode 6.3. \S inside a class stays: nobody writes it.
std::string WithUnicodeSpace(const std::string& pattern) {
  constexpr char kSpace[] = "\\t-\\r\\x{85}\\p{Z}";
  std::string out;
  bool in_class = false;
  for (size_t i = 0; i < pattern.size(); ++i) {
    if (pattern[i] == '\\' && i + 1 < pattern.size()) {
      const char next = pattern[++i];
      if (next == 's')
        absl::StrAppend(&out, in_class ? "" : "[", kSpace, in_class ? "" : "]");
      else if (next == 'S' && !in_class)
        absl::StrAppend(&out, "[^", kSpace, "]");
      else
        absl::StrAppend(&out, "\\", std::string(1, next));
      continue;
    }
    if (pattern[i] == '[') in_class = true;
    if (pattern[i] == ']') in_class = false;
    out += pattern[i];
  }
  return out;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Regex>> Regex::Compile(const std::string& pattern) {
  if (pattern.size() > 64 << 10) {
    return absl::InvalidArgumentError(
        absl::StrCat("the pattern has ", pattern.size(), " bytes; at most ", 64 << 10, " are accepted"));
  }
  const std::string written = WithUnicodeSpace(pattern);
  int error = 0;
  PCRE2_SIZE at = 0;
  pcre2_code* const code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(written.data()), written.size(),
                                         PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &at, nullptr);
  if (code == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("the pattern '", pattern.substr(0, 200), "' is wrong: ", ErrorText(error)));
  }
  pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);  // where it cannot, pcre2_match interprets
  return std::unique_ptr<Regex>(new Regex(code));
}

Regex::~Regex() { pcre2_code_free(static_cast<pcre2_code*>(code_)); }

absl::Status Regex::ForEachMatch(std::string_view text, absl::FunctionRef<void(size_t, size_t)> on_match) const {
  Scratch& scratch = TheScratch();
  const PCRE2_SIZE* const found = pcre2_get_ovector_pointer(scratch.data);
  const auto* const subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  const auto begin = std::chrono::steady_clock::now();
  size_t at = 0;
  for (int64_t count = 1; at < text.size(); ++count) {
    // Checked once by the caller, not again from `at` on at every match.
    const int rc = pcre2_match(static_cast<const pcre2_code*>(code_), subject, text.size(), at, PCRE2_NO_UTF_CHECK, scratch.data,
                               scratch.context);
    if (rc == PCRE2_ERROR_NOMATCH) break;
    if (rc < 0) return absl::InvalidArgumentError(absl::StrCat("text: the tokenizer's pattern fails on it: ", ErrorText(rc)));
    if (found[1] <= at && found[0] >= found[1]) {  // nothing was matched: go on at the next character
      at += 1;
      while (at < text.size() && (text[at] & 0xc0) == 0x80) ++at;
      continue;
    }
    if (found[0] < at || found[1] < found[0]) break;  // \K may turn it round
    if (found[1] > found[0]) on_match(found[0], found[1]);
    at = found[1];
    if (count % 64 == 0 && std::chrono::steady_clock::now() - begin > kTimeLimit) {
      return absl::InvalidArgumentError(
          absl::StrCat("text: the tokenizer's pattern took more than ", kTimeLimit.count(), " s on it"));
    }
  }
  return absl::OkStatus();
}

std::string EscapeRegex(std::string_view text) {
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x80 && !absl::ascii_isalnum(byte)) out += '\\';
    out += c;
  }
  return out;
}

}  // namespace memserve::engine
