// Reading tokenizer.json, which may be wrong or hostile. Its vocabulary and merges are long, so they do not become JSON values.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace memserve::engine {

struct TextPattern {
  std::string text;
  bool is_regex = false;
};

// Takes fields of one object; remembers the first thing that is wrong. A field that is null is absent.
class JsonFields {
 public:
  JsonFields(const nlohmann::json& object, std::string where) : object_(object), where_(std::move(where)) {
    if (!object.is_object()) Fail("is not an object");
  }
  std::string String(const char* key);
  std::string OptionalString(const char* key, const std::string& fallback);
  bool Bool(const char* key, bool fallback);
  int64_t Int(const char* key, int64_t low, int64_t high);
  const nlohmann::json& Array(const char* key);  // empty where there is none: an error
  const nlohmann::json& Value(const char* key);  // null where there is none
  TextPattern Pattern(const char* key);          // {"String": …} or {"Regex": …}
  const absl::Status& status() const { return status_; }

 private:
  void Fail(const std::string& message);
  const nlohmann::json* Find(const char* key) const;

  const nlohmann::json& object_;
  const std::string where_;
  absl::Status status_;
};

struct TokenizerJson {
  nlohmann::json rest;  // all but model.vocab and model.merges
  std::vector<std::pair<std::string, int64_t>> vocab;
  std::vector<std::pair<std::string, std::string>> merges;
};

// At most 32 levels deep, no key twice. INVALID_ARGUMENT says what is wrong and where.
absl::StatusOr<TokenizerJson> ParseTokenizerJson(const std::string& text);

}  // namespace memserve::engine
