// What a template computes with: Python's values, as far as chat templates use them. They are immutable trees of bounded depth;
// only a namespace can be changed, and it is never part of another value.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace memserve::engine::jinja {

// UTF-8 whose every byte knows whether it came from a message or from the template: special tokens are taken only from the latter.
class Text {
 public:
  Text() = default;
  Text(std::string bytes, bool from_message) : bytes_(std::move(bytes)), marks_(bytes_.size(), from_message ? '\1' : '\0') {}

  const std::string& bytes() const { return bytes_; }
  const std::string& marks() const { return marks_; }  // beside bytes: 1 is from a message
  size_t size() const { return bytes_.size(); }
  bool empty() const { return bytes_.empty(); }

  void Append(const Text& other) {
    bytes_ += other.bytes_;
    marks_ += other.marks_;
  }
  // One character from somewhere, with the mark of a byte.
  void Append(std::string_view bytes, char mark) {
    bytes_ += bytes;
    marks_.append(bytes.size(), mark);
  }
  Text Part(size_t begin, size_t size) const {
    Text part;
    part.bytes_ = bytes_.substr(begin, size);
    part.marks_ = marks_.substr(begin, size);
    return part;
  }

 private:
  std::string bytes_;
  std::string marks_;
};

struct Statement;  // of a macro
class Value;
using List = std::vector<Value>;
using Dict = std::vector<std::pair<std::string, Value>>;  // in the order of insertion

enum class Kind { kUndefined, kNone, kBool, kInt, kFloat, kText, kList, kDict, kNamespace, kMacro, kFunction };

class Value {
 public:
  Value() = default;  // undefined
  static Value None() { return Value(Kind::kNone); }
  static Value Bool(bool value) {
    Value v(Kind::kBool);
    v.int_ = value;
    return v;
  }
  static Value Int(int64_t value) {
    Value v(Kind::kInt);
    v.int_ = value;
    return v;
  }
  static Value Float(double value) {
    Value v(Kind::kFloat);
    v.float_ = value;
    return v;
  }
  static Value Of(Text text) {
    Value v(Kind::kText);
    v.text_ = std::make_shared<const Text>(std::move(text));
    return v;
  }
  static Value Written(std::string text) { return Of(Text(std::move(text), false)); }
  static Value Of(List list);
  static Value Of(Dict dict);
  static Value Namespace(Dict dict);
  static Value Macro(const Statement* macro) {
    Value v(Kind::kMacro);
    v.macro_ = macro;
    return v;
  }
  static Value Function(std::string name) {
    Value v(Kind::kFunction);
    v.text_ = std::make_shared<const Text>(std::move(name), false);
    return v;
  }

  Kind kind() const { return kind_; }
  bool is(Kind kind) const { return kind_ == kind; }
  bool is_number() const { return kind_ == Kind::kInt || kind_ == Kind::kFloat || kind_ == Kind::kBool; }
  int64_t integer() const { return int_; }  // of kInt, kBool
  double number() const { return kind_ == Kind::kFloat ? float_ : static_cast<double>(int_); }
  const Text& text() const { return *text_; }  // of kText, kFunction (its name)
  const List& list() const { return *list_; }
  const Dict& dict() const { return *dict_; }  // of kDict, kNamespace
  Dict& fields() const { return *dict_; }      // of kNamespace
  const Statement* macro() const { return macro_; }
  int depth() const { return depth_; }  // 0 for what has no parts
  // About how many bytes it takes to write, parts that are shared counted wherever they stand.
  int64_t weight() const;

  bool truthy() const;
  const Value* Find(std::string_view key) const;  // of kDict, kNamespace; null: none
  const char* type_name() const;

 private:
  explicit Value(Kind kind) : kind_(kind) {}

  Kind kind_ = Kind::kUndefined;
  int depth_ = 0;
  int64_t weight_ = 0;  // of the parts
  union {
    int64_t int_ = 0;
    double float_;
    const Statement* macro_;
  };
  std::shared_ptr<const Text> text_;
  std::shared_ptr<const List> list_;
  std::shared_ptr<Dict> dict_;
};

// Python's ==. Numbers by value, all else by kind and parts.
bool Equal(const Value& a, const Value& b);

// Python's str() and repr(), and transformers' tojson. indent < 0: on one line.
Text ToText(const Value& value);
Text Repr(const Value& value);
Text ToJson(const Value& value, int indent);

}  // namespace memserve::engine::jinja
