#include "engine/jinja/value.h"

#include <algorithm>
#include <charconv>
#include <cmath>

namespace memserve::engine::jinja {
namespace {

std::string FloatText(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  char buffer[64];
  const auto end = std::to_chars(buffer, buffer + sizeof(buffer), value).ptr;
  std::string text(buffer, end);
  if (text.find_first_of(".e") == std::string::npos) text += ".0";
  return text;
}

void AppendLiteral(Text& text, std::string_view literal) { text.Append(literal, '\0'); }

// Escapes keep the mark of what they stand for.
void AppendJsonString(Text& out, const Text& text) {
  AppendLiteral(out, "\"");
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text.bytes()[i];
    const char mark = text.marks()[i];
    const auto escaped = [&]() -> std::string {
      switch (c) {
        case '"':
          return "\\\"";
        case '\\':
          return "\\\\";
        case '\n':
          return "\\n";
        case '\r':
          return "\\r";
        case '\t':
          return "\\t";
        case '\b':
          return "\\b";
        case '\f':
          return "\\f";
        default:
          break;
      }
      if (static_cast<unsigned char>(c) >= 0x20) return std::string(1, c);
      constexpr char kHex[] = "0123456789abcdef";
      return std::string("\\u00") + kHex[c >> 4 & 15] + kHex[c & 15];
    }();
    out.Append(escaped, mark);
  }
  AppendLiteral(out, "\"");
}

void AppendRepr(Text& out, const Value& value) {
  if (!value.is(Kind::kText)) {
    out.Append(ToText(value));
    return;
  }
  const Text& text = value.text();
  const bool double_quotes = text.bytes().find('\'') != std::string::npos && text.bytes().find('"') == std::string::npos;
  const char quote = double_quotes ? '"' : '\'';
  out.Append(std::string_view(&quote, 1), '\0');
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text.bytes()[i];
    if (c == quote || c == '\\')
      out.Append(std::string("\\") + c, text.marks()[i]);
    else if (c == '\n')
      out.Append("\\n", text.marks()[i]);
    else if (c == '\r')
      out.Append("\\r", text.marks()[i]);
    else if (c == '\t')
      out.Append("\\t", text.marks()[i]);
    else
      out.Append(std::string_view(&c, 1), text.marks()[i]);
  }
  out.Append(std::string_view(&quote, 1), '\0');
}

void AppendJson(Text& out, const Value& value, int indent, int level) {
  const auto line = [&](int at) {
    if (indent >= 0) AppendLiteral(out, "\n" + std::string(static_cast<size_t>(indent) * static_cast<size_t>(at), ' '));
  };
  switch (value.kind()) {
    case Kind::kText:
      AppendJsonString(out, value.text());
      return;
    case Kind::kBool:
      AppendLiteral(out, value.truthy() ? "true" : "false");
      return;
    case Kind::kInt:
    case Kind::kFloat:
      out.Append(ToText(value));
      return;
    case Kind::kList: {
      AppendLiteral(out, "[");
      bool first = true;
      for (const Value& item : value.list()) {
        if (!first) AppendLiteral(out, indent >= 0 ? "," : ", ");
        first = false;
        line(level + 1);
        AppendJson(out, item, indent, level + 1);
      }
      if (!first) line(level);
      AppendLiteral(out, "]");
      return;
    }
    case Kind::kDict: {
      AppendLiteral(out, "{");
      bool first = true;
      for (const auto& [key, item] : value.dict()) {
        if (!first) AppendLiteral(out, indent >= 0 ? "," : ", ");
        first = false;
        line(level + 1);
        AppendJsonString(out, Text(key, false));
        AppendLiteral(out, ": ");
        AppendJson(out, item, indent, level + 1);
      }
      if (!first) line(level);
      AppendLiteral(out, "}");
      return;
    }
    default:
      AppendLiteral(out, "null");
  }
}

constexpr int64_t kMaxWeight = int64_t{1} << 50;

template <typename Parts, typename Of>
int64_t WeightOf(const Parts& parts, const Of& of) {
  int64_t weight = 2;
  for (const auto& part : parts) weight = std::min(kMaxWeight, weight + of(part).weight() + 8);
  return weight;
}

template <typename Parts, typename Of>
int DepthOf(const Parts& parts, const Of& of) {
  int depth = 0;
  for (const auto& part : parts) depth = std::max(depth, of(part).depth());
  return depth + 1;
}

}  // namespace

Value Value::Of(List list) {
  Value v(Kind::kList);
  const auto part_of = [](const Value& part) -> const Value& { return part; };
  v.depth_ = DepthOf(list, part_of);
  v.weight_ = WeightOf(list, part_of);
  v.list_ = std::make_shared<const List>(std::move(list));
  return v;
}

Value Value::Of(Dict dict) {
  Value v(Kind::kDict);
  const auto part_of = [](const auto& part) -> const Value& { return part.second; };
  v.depth_ = DepthOf(dict, part_of);
  v.weight_ = WeightOf(dict, part_of);
  for (const auto& [key, value] : dict) v.weight_ = std::min(kMaxWeight, v.weight_ + static_cast<int64_t>(key.size()));
  v.dict_ = std::make_shared<Dict>(std::move(dict));
  return v;
}

Value Value::Namespace(Dict dict) {
  Value v(Kind::kNamespace);
  v.dict_ = std::make_shared<Dict>(std::move(dict));
  return v;
}

bool Value::truthy() const {
  switch (kind_) {
    case Kind::kUndefined:
    case Kind::kNone:
      return false;
    case Kind::kBool:
    case Kind::kInt:
      return int_ != 0;
    case Kind::kFloat:
      return float_ != 0;
    case Kind::kText:
      return !text_->empty();
    case Kind::kList:
      return !list_->empty();
    case Kind::kDict:
      return !dict_->empty();
    case Kind::kNamespace:
    case Kind::kMacro:
    case Kind::kFunction:
      return true;
  }
  return false;
}

int64_t Value::weight() const { return kind_ == Kind::kText ? static_cast<int64_t>(text_->size()) : depth_ > 0 ? weight_ : 24; }

const Value* Value::Find(std::string_view key) const {
  for (const auto& [name, value] : *dict_) {
    if (name == key) return &value;
  }
  return nullptr;
}

const char* Value::type_name() const {
  constexpr const char* kNames[] = {"undefined", "None", "bool",      "int",   "float",   "str",
                                    "list",      "dict", "namespace", "macro", "function"};
  return kNames[static_cast<int>(kind_)];
}

bool Equal(const Value& a, const Value& b) {
  if (a.is_number() && b.is_number()) {
    if (!a.is(Kind::kFloat) && !b.is(Kind::kFloat)) return a.integer() == b.integer();
    return a.number() == b.number();
  }
  if (a.kind() != b.kind()) return false;
  switch (a.kind()) {
    case Kind::kText:
      return a.text().bytes() == b.text().bytes();
    case Kind::kList:
      return std::equal(a.list().begin(), a.list().end(), b.list().begin(), b.list().end(), Equal);
    case Kind::kDict: {
      if (a.dict().size() != b.dict().size()) return false;
      for (const auto& [key, value] : a.dict()) {
        const Value* other = b.Find(key);
        if (other == nullptr || !Equal(value, *other)) return false;
      }
      return true;
    }
    case Kind::kNamespace:
      return &a.dict() == &b.dict();
    case Kind::kMacro:
      return a.macro() == b.macro();
    case Kind::kFunction:
      return a.text().bytes() == b.text().bytes();
    default:
      return true;
  }
}

Text ToText(const Value& value) {
  switch (value.kind()) {
    case Kind::kUndefined:
      return Text();
    case Kind::kNone:
      return Text("None", false);
    case Kind::kBool:
      return Text(value.truthy() ? "True" : "False", false);
    case Kind::kInt:
      return Text(std::to_string(value.integer()), false);
    case Kind::kFloat:
      return Text(FloatText(value.number()), false);
    case Kind::kText:
      return value.text();
    case Kind::kList: {
      Text out("[", false);
      for (size_t i = 0; i < value.list().size(); ++i) {
        if (i > 0) AppendLiteral(out, ", ");
        AppendRepr(out, value.list()[i]);
      }
      AppendLiteral(out, "]");
      return out;
    }
    case Kind::kDict: {
      Text out("{", false);
      bool first = true;
      for (const auto& [key, item] : value.dict()) {
        if (!first) AppendLiteral(out, ", ");
        first = false;
        AppendRepr(out, Value::Written(key));
        AppendLiteral(out, ": ");
        AppendRepr(out, item);
      }
      AppendLiteral(out, "}");
      return out;
    }
    default:
      return Text(std::string("<") + value.type_name() + ">", false);
  }
}

Text Repr(const Value& value) {
  Text out;
  AppendRepr(out, value);
  return out;
}

Text ToJson(const Value& value, int indent) {
  Text out;
  AppendJson(out, value, indent, 0);
  return out;
}

}  // namespace memserve::engine::jinja
