// Reads keys of one JSON object of a configuration file; remembers the first thing that is wrong.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "engine/model/json.h"

namespace memserve::engine {

class ConfigReader {
 public:
  // `where` names the object in messages. `object` outlives the reader.
  ConfigReader(const nlohmann::json& object, std::string where) : object_(object), where_(std::move(where)) {}

  // The integer under `key`, or `fallback` where it is absent or null. Out of [low, high] is an error.
  int64_t Int(const char* key, int64_t low, int64_t high, std::optional<int64_t> fallback) {
    const nlohmann::json* value = Find(key);
    if (value == nullptr) return fallback ? *fallback : Missing<int64_t>(key);
    if (!value->is_number_integer()) return Wrong<int64_t>(key, *value, "an integer");
    const bool fits = !value->is_number_unsigned() || value->get<uint64_t>() <= static_cast<uint64_t>(INT64_MAX);
    if (!fits || value->get<int64_t>() < low || value->get<int64_t>() > high) {
      return Wrong<int64_t>(key, *value, absl::StrCat("in [", low, ", ", high, "]"));
    }
    return value->get<int64_t>();
  }

  double Number(const char* key, double low, double high, std::optional<double> fallback) {
    const nlohmann::json* value = Find(key);
    if (value == nullptr) return fallback ? *fallback : Missing<double>(key);
    if (!value->is_number() || !(value->get<double>() >= low && value->get<double>() <= high)) {
      return Wrong<double>(key, *value, absl::StrCat("a number in [", low, ", ", high, "]"));
    }
    return value->get<double>();
  }

  bool Bool(const char* key, bool fallback) {
    const nlohmann::json* value = Find(key);
    if (value == nullptr) return fallback;
    if (!value->is_boolean()) return Wrong<bool>(key, *value, "true or false");
    return value->get<bool>();
  }

  std::string String(const char* key, const std::string& fallback) {
    const nlohmann::json* value = Find(key);
    if (value == nullptr) return fallback;
    if (!value->is_string()) return Wrong<std::string>(key, *value, "a string");
    return value->get<std::string>();
  }

  // The object under `key`; null where it is absent, null or (an error) something else.
  const nlohmann::json* Object(const char* key) {
    const nlohmann::json* value = Find(key);
    if (value != nullptr && !value->is_object()) return Wrong<const nlohmann::json*>(key, *value, "an object");
    return value;
  }

  // Null where the key is absent or its value is null.
  const nlohmann::json* Find(const char* key) const {
    const auto it = object_.find(key);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }
  // True also where the value is null.
  bool Has(const char* key) const { return object_.contains(key); }

  template <typename T>
  T Wrong(const char* key, const nlohmann::json& value, const std::string& expected) {
    Fail(absl::StrCat(key, " is ", value.dump(-1, ' ', true).substr(0, 100), "; it must be ", expected));
    return T();
  }

  void Fail(const std::string& message) {
    if (status_.ok()) status_ = absl::InvalidArgumentError(absl::StrCat(where_, ": ", message));
  }
  void Fail(const absl::Status& status) {
    if (status_.ok()) status_ = status;
  }
  const absl::Status& status() const { return status_; }
  const std::string& where() const { return where_; }

 private:
  template <typename T>
  T Missing(const char* key) {
    Fail(absl::StrCat(key, " is missing"));
    return T();
  }

  const nlohmann::json& object_;
  const std::string where_;
  absl::Status status_;
};

// The ids that end and begin a text, as config.json and generation_config.json may name them.
struct SpecialTokens {
  std::vector<int32_t> eos;
  std::optional<int32_t> bos;
};
absl::StatusOr<SpecialTokens> ReadSpecialTokens(ConfigReader& reader);

// Bounds that every model keeps.
inline constexpr int64_t kMaxDim = 1 << 20;
inline constexpr int64_t kMaxFfnDim = 16 * kMaxDim;
inline constexpr int64_t kMaxLayers = 4096;
inline constexpr int64_t kMaxHeads = 4096;
inline constexpr int64_t kMaxHeadDim = 4096;
inline constexpr int64_t kMaxVocabulary = 1 << 24;
inline constexpr int64_t kMaxPositions = 1 << 24;

}  // namespace memserve::engine
