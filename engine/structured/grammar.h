// What a text must look like, compiled against a vocabulary: which tokens may come next. The library behind it (xgrammar) is seen
// by grammar.cc alone; without it (MEMSERVE_STRUCTURED off) everything here is UNIMPLEMENTED.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "engine/request.h"

namespace memserve::engine {

bool StructuredOutputIsBuilt();

// Why the fields of a request cannot be taken, if so. Whether they can be parsed is found out by compiling them.
absl::Status Validate(const StructuredOutput& structured);

// The name of the field that is set: "structured.regex", …
std::string FieldOf(const StructuredOutput& structured);

// The bytes of each token: empty for those that stand for no text, which are never allowed. Immutable.
class GrammarVocabulary {
 public:
  static absl::StatusOr<std::unique_ptr<GrammarVocabulary>> New(const std::vector<std::string>& tokens);
  virtual ~GrammarVocabulary() = default;
};

// Follows one sequence. Not thread-safe.
class GrammarMatcher {
 public:
  virtual ~GrammarMatcher() = default;

  // Brings the state to what these drawn tokens leave it in, forwards or backwards from where it is. False: they do not match; the
  // state is then that of the longest part which does.
  virtual bool MoveTo(absl::Span<const int32_t> drawn) = 0;

  // The tokens that may come next: bit id % 32 of word id / 32. [⌈vocabulary / 32⌉]
  virtual const std::vector<uint32_t>& Allowed() = 0;

  // What was drawn matches as it is.
  virtual bool IsComplete() const = 0;

  // The most that a move or a mask took, of this thread's time.
  virtual absl::Duration slowest() const = 0;
};

// Immutable, may be used from several threads.
class Grammar {
 public:
  virtual ~Grammar() = default;
  virtual int64_t bytes() const = 0;
  virtual std::unique_ptr<GrammarMatcher> NewMatcher() const = 0;
};

// Takes what time and memory it takes: see GrammarCompiler, which has it done by a process that can be killed. INVALID_ARGUMENT: it
// cannot be parsed, or asks for what the library would ignore.
absl::StatusOr<std::string> CompileGrammar(const GrammarVocabulary& vocabulary, const StructuredOutput& structured);

// From what CompileGrammar gave for the same vocabulary and kind.
absl::StatusOr<std::shared_ptr<const Grammar>> ReadGrammar(std::shared_ptr<const GrammarVocabulary> vocabulary,
                                                           StructuredOutput::Kind kind, const std::string& compiled);

// Follows a few random texts of a compiled grammar: what is ambiguous may take minutes for a single mask, which nothing can
// interrupt but the end of the process. INVALID_ARGUMENT: a token took more than `limit`.
absl::Status TryGrammar(const Grammar& grammar, int vocab_size, absl::Duration limit);

}  // namespace memserve::engine
