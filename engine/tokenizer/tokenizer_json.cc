#include "engine/tokenizer/tokenizer_json.h"

#include "absl/strings/str_cat.h"

namespace memserve::engine {
namespace {

using nlohmann::json;

constexpr size_t kMaxDepth = 32;

// Builds the document, but for the two long parts, which it puts into their lists.
class Builder final : public nlohmann::json_sax<json> {
 public:
  explicit Builder(TokenizerJson& result) : result_(result) {}

  const std::string& error() const { return error_; }

  bool null() override { return Value(json()); }
  bool boolean(bool value) override { return Value(value); }
  bool number_integer(number_integer_t value) override { return Number(value); }
  bool number_unsigned(number_unsigned_t value) override { return Number(value); }
  bool number_float(number_float_t value, const string_t&) override { return Value(value); }
  bool string(string_t& value) override {
    if (part_ != Part::kMerges) return Value(std::move(value));
    if (depth_in_part_ == 2) {
      pair_.push_back(std::move(value));
      return pair_.size() <= 2 || Fail("model.merges has an entry of more than two strings");
    }
    const size_t space = value.find(' ');
    if (space == std::string::npos || value.find(' ', space + 1) != std::string::npos) {
      return Fail(absl::StrCat("model.merges has '", value.substr(0, 100), "'; it must be two tokens with a space between"));
    }
    result_.merges.emplace_back(value.substr(0, space), value.substr(space + 1));
    return true;
  }
  bool binary(binary_t&) override { return Fail("has binary data"); }
  bool start_object(size_t) override {
    if (part_ != Part::kNone) return Fail(absl::StrCat(NameOfPart(), " has an object inside"));
    if (AtModel("vocab")) return Enter(Part::kVocab);
    return Open(json::object());
  }
  bool key(string_t& value) override {
    if (part_ == Part::kVocab) {
      key_ = std::move(value);
      return true;
    }
    json& object = *open_.back();
    if (object.contains(value)) return Fail(absl::StrCat("has the key '", value.substr(0, 200), "' twice"));
    keys_.back() = std::move(value);
    return true;
  }
  bool end_object() override { return part_ == Part::kVocab ? Leave() : Close(); }
  bool start_array(size_t) override {
    if (part_ == Part::kMerges && depth_in_part_ == 1) {
      depth_in_part_ = 2;
      pair_.clear();
      return true;
    }
    if (part_ != Part::kNone) return Fail(absl::StrCat(NameOfPart(), " has an array inside"));
    if (AtModel("merges")) return Enter(Part::kMerges);
    return Open(json::array());
  }
  bool end_array() override {
    if (part_ != Part::kMerges) return Close();
    if (depth_in_part_ == 1) return Leave();
    depth_in_part_ = 1;
    if (pair_.size() != 2) return Fail("model.merges has an entry that is not two strings");
    result_.merges.emplace_back(std::move(pair_[0]), std::move(pair_[1]));
    return true;
  }
  bool parse_error(size_t position, const std::string&, const nlohmann::detail::exception&) override {
    return Fail(absl::StrCat("is not JSON: it breaks off or is wrong at byte ", position));
  }

 private:
  enum class Part { kNone, kVocab, kMerges };

  std::string NameOfPart() const { return part_ == Part::kVocab ? "model.vocab" : "model.merges"; }
  bool Fail(std::string message) {
    if (error_.empty()) error_ = std::move(message);
    return false;
  }
  bool AtModel(const char* key) const {
    return open_.size() == 2 && keys_[0] == "model" && keys_[1] == key && open_[1]->is_object();
  }
  bool Enter(Part part) {
    part_ = part;
    depth_in_part_ = 1;
    return seen_[part == Part::kVocab]++ == 0 || Fail(absl::StrCat("has ", NameOfPart(), " twice"));
  }
  bool Leave() {
    part_ = Part::kNone;
    return true;
  }
  template <typename T>
  bool Number(T value) {
    if (part_ != Part::kVocab) return Value(value);
    if (static_cast<uint64_t>(value) > INT32_MAX) {
      return Fail(
          absl::StrCat("model.vocab gives '", key_.substr(0, 100), "' the id ", value, "; it must be in [0, ", INT32_MAX, "]"));
    }
    result_.vocab.emplace_back(std::move(key_), static_cast<int64_t>(value));
    return true;
  }
  json* Put(json value) {
    if (open_.empty()) {
      result_.rest = std::move(value);
      return &result_.rest;
    }
    json& parent = *open_.back();
    if (parent.is_object()) return &(parent[keys_.back()] = std::move(value));
    parent.push_back(std::move(value));
    return &parent.back();
  }
  bool Value(json value) {
    if (part_ != Part::kNone)
      return Fail(absl::StrCat(NameOfPart(), " has a value of the wrong kind, ",
                               value.dump(-1, ' ', false, json::error_handler_t::replace).substr(0, 100)));
    Put(std::move(value));
    return true;
  }
  bool Open(json value) {
    if (open_.size() >= kMaxDepth) return Fail(absl::StrCat("is nested more than ", kMaxDepth, " levels deep"));
    // Children are built in place: a parent's other children do not move while one of them is open.
    open_.push_back(Put(std::move(value)));
    keys_.emplace_back();
    return true;
  }
  bool Close() {
    open_.pop_back();
    keys_.pop_back();
    return true;
  }

  TokenizerJson& result_;
  std::vector<json*> open_;
  std::vector<std::string> keys_;  // beside open_: the key that was read last
  Part part_ = Part::kNone;
  int depth_in_part_ = 0;
  int seen_[2] = {0, 0};
  std::string key_;
  std::vector<std::string> pair_;
  std::string error_;
};

}  // namespace

void JsonFields::Fail(const std::string& message) {
  if (status_.ok()) status_ = absl::InvalidArgumentError(absl::StrCat(where_, ": ", message));
}

const json* JsonFields::Find(const char* key) const {
  if (!object_.is_object()) return nullptr;
  const auto it = object_.find(key);
  return it == object_.end() || it->is_null() ? nullptr : &*it;
}

std::string JsonFields::String(const char* key) {
  const json* value = Find(key);
  if (value != nullptr && value->is_string()) return value->get<std::string>();
  Fail(absl::StrCat(key, value == nullptr ? " is missing" : " is not a string"));
  return "";
}

std::string JsonFields::OptionalString(const char* key, const std::string& fallback) {
  return Find(key) == nullptr ? fallback : String(key);
}

bool JsonFields::Bool(const char* key, bool fallback) {
  const json* value = Find(key);
  if (value == nullptr) return fallback;
  if (value->is_boolean()) return value->get<bool>();
  Fail(absl::StrCat(key, " is not true or false"));
  return fallback;
}

int64_t JsonFields::Int(const char* key, int64_t low, int64_t high) {
  const json* value = Find(key);
  if (value != nullptr && value->is_number_integer() && *value >= low && *value <= high) return value->get<int64_t>();
  Fail(absl::StrCat(key,
                    value == nullptr
                        ? " is missing"
                        : absl::StrCat(" is ", value->dump(-1, ' ', false, json::error_handler_t::replace).substr(0, 40)),
                    "; it must be an integer in [", low, ", ", high, "]"));
  return low;
}

const json& JsonFields::Array(const char* key) {
  static const json* const empty = new json(json::array());
  const json* value = Find(key);
  if (value != nullptr && value->is_array()) return *value;
  Fail(absl::StrCat(key, " is not an array"));
  return *empty;
}

const json& JsonFields::Value(const char* key) {
  static const json* const null = new json();
  const json* value = Find(key);
  return value == nullptr ? *null : *value;
}

TextPattern JsonFields::Pattern(const char* key) {
  const json* value = Find(key);
  if (value != nullptr && value->is_object() && value->size() == 1 && value->begin()->is_string()) {
    const std::string& kind = value->begin().key();
    if (kind == "String" || kind == "Regex") return {value->begin()->get<std::string>(), kind == "Regex"};
  }
  Fail(absl::StrCat(key, R"( is not {"String": …} or {"Regex": …})"));
  return {};
}

absl::StatusOr<TokenizerJson> ParseTokenizerJson(const std::string& text) {
  TokenizerJson result;
  Builder builder(result);
  const bool read = json::sax_parse(text, &builder);
  if (!builder.error().empty()) return absl::InvalidArgumentError(builder.error());
  if (!read || !result.rest.is_object()) return absl::InvalidArgumentError("is not a JSON object");
  return result;
}

}  // namespace memserve::engine
