#include "engine/jinja/functions.h"

#include <utf8proc.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "engine/tokenizer/utf8.h"

namespace memserve::engine::jinja {
namespace {

constexpr int kMaxDepth = 64;  // of lists and dicts inside each other
constexpr int64_t kMaxRange = 100'000;

Value Written(std::string text) { return Value::Written(std::move(text)); }

void Unknown(const char* what, std::string_view name, const Value& object, Meter& meter) {
  meter.Fail(absl::StrCat("the ", what, " '", std::string(name), "' of a ", object.type_name(), " is not known"));
}

// --- characters

int32_t CharacterAt(std::string_view text) {
  utf8proc_int32_t c = 0;
  utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data()), static_cast<utf8proc_ssize_t>(text.size()), &c);
  return c;
}

// What Python's str.strip takes away.
bool IsSpace(int32_t c) {
  return (c >= 9 && c <= 13) || (c >= 0x1c && c <= 0x20) || c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) ||
         c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

// Begin of each character, then the end.
std::vector<size_t> CharacterStarts(const std::string& bytes) {
  std::vector<size_t> starts;
  for (size_t at = 0; at < bytes.size(); at += CharacterBytes(std::string_view(bytes).substr(at))) starts.push_back(at);
  starts.push_back(bytes.size());
  return starts;
}

int64_t CharacterCount(const std::string& bytes) {
  return std::count_if(bytes.begin(), bytes.end(), [](char c) { return (c & 0xc0) != 0x80; });
}

// `change` maps a character, given whether a letter stands before it.
template <typename Change>
Text MapCharacters(const Text& text, const Change& change) {
  Text out;
  bool after_letter = false;
  for (size_t at = 0; at < text.size();) {
    const std::string_view rest = std::string_view(text.bytes()).substr(at);
    const size_t size = CharacterBytes(rest);
    const int32_t c = CharacterAt(rest);
    utf8proc_uint8_t bytes[4];
    const utf8proc_ssize_t length = utf8proc_encode_char(change(c, after_letter), bytes);
    out.Append(std::string_view(reinterpret_cast<const char*>(bytes), static_cast<size_t>(length)), text.marks()[at]);
    after_letter = utf8proc_category(c) >= UTF8PROC_CATEGORY_LU && utf8proc_category(c) <= UTF8PROC_CATEGORY_LO;
    at += size;
  }
  return out;
}

Text Upper(const Text& text) {
  return MapCharacters(text, [](int32_t c, bool) { return utf8proc_toupper(c); });
}
Text Lower(const Text& text) {
  return MapCharacters(text, [](int32_t c, bool) { return utf8proc_tolower(c); });
}
Text Title(const Text& text) {
  return MapCharacters(text, [](int32_t c, bool inside) { return inside ? utf8proc_tolower(c) : utf8proc_toupper(c); });
}
Text Capitalize(const Text& text) {
  bool first = true;
  return MapCharacters(text,
                       [&](int32_t c, bool) { return std::exchange(first, false) ? utf8proc_toupper(c) : utf8proc_tolower(c); });
}

// chars null: white space.
Text Strip(const Text& text, const std::string* chars, bool left, bool right) {
  const auto goes = [&](std::string_view character) {
    return chars == nullptr ? IsSpace(CharacterAt(character)) : chars->find(character) != std::string::npos;
  };
  size_t begin = 0;
  size_t end = text.size();
  const std::string_view bytes = text.bytes();
  while (left && begin < end) {
    const size_t size = CharacterBytes(bytes.substr(begin));
    if (!goes(bytes.substr(begin, size))) break;
    begin += size;
  }
  while (right && end > begin) {
    size_t start = end - 1;
    while (start > begin && (bytes[start] & 0xc0) == 0x80) --start;
    if (!goes(bytes.substr(start, end - start))) break;
    end = start;
  }
  return text.Part(begin, end - begin);
}

// Of white space where `separator` is null. most < 0: all.
List Split(const Text& text, const std::string* separator, int64_t most) {
  List parts;
  const std::string& bytes = text.bytes();
  if (separator != nullptr) {
    size_t begin = 0;
    for (size_t at; most != 0 && (at = bytes.find(*separator, begin)) != std::string::npos; --most) {
      parts.push_back(Value::Of(text.Part(begin, at - begin)));
      begin = at + separator->size();
    }
    parts.push_back(Value::Of(text.Part(begin, bytes.size() - begin)));
    return parts;
  }
  size_t at = 0;
  const auto skip = [&](bool space) {
    while (at < bytes.size() && IsSpace(CharacterAt(std::string_view(bytes).substr(at))) == space) {
      at += CharacterBytes(std::string_view(bytes).substr(at));
    }
  };
  while (true) {
    skip(true);
    if (at >= bytes.size()) return parts;
    const size_t begin = at;
    if (most-- == 0) {
      parts.push_back(Value::Of(Strip(text.Part(begin, bytes.size() - begin), nullptr, false, true)));
      return parts;
    }
    skip(false);
    parts.push_back(Value::Of(text.Part(begin, at - begin)));
  }
}

List SplitFromRight(const Text& text, const std::string& separator, int64_t most) {
  List parts;
  size_t end = text.size();
  while (most != 0 && end >= separator.size()) {
    const size_t at = text.bytes().rfind(separator, end - separator.size());
    if (at == std::string::npos) break;
    parts.push_back(Value::Of(text.Part(at + separator.size(), end - at - separator.size())));
    end = at;
    --most;
  }
  parts.push_back(Value::Of(text.Part(0, end)));
  std::reverse(parts.begin(), parts.end());
  return parts;
}

List SplitLines(const Text& text) {
  List lines;
  size_t begin = 0;
  for (size_t at; (at = text.bytes().find_first_of("\n\r", begin)) != std::string::npos;) {
    lines.push_back(Value::Of(text.Part(begin, at - begin)));
    begin = at + (text.bytes().compare(at, 2, "\r\n") == 0 ? 2 : 1);
  }
  if (begin < text.size()) lines.push_back(Value::Of(text.Part(begin, text.size() - begin)));
  return lines;
}

Text Replace(const Text& text, const std::string& from, const Text& to, int64_t most, Meter& meter) {
  Text out;
  size_t begin = 0;
  const auto put = [&](size_t at) {
    out.Append(text.Part(begin, at - begin));
    out.Append(to);
    return meter.Bytes(static_cast<int64_t>(to.size())) && meter.Steps(1);
  };
  if (from.empty()) {  // between all characters
    for (const size_t at : CharacterStarts(text.bytes())) {
      if (most-- == 0 || !put(at)) break;
      begin = at;
    }
  } else {
    for (size_t at; most != 0 && (at = text.bytes().find(from, begin)) != std::string::npos; --most) {
      if (!put(at)) break;
      begin = at + from.size();
    }
  }
  out.Append(text.Part(begin, text.size() - begin));
  return out;
}

Text Join(const List& items, const Text& separator, Meter& meter) {
  Text out;
  for (size_t i = 0; i < items.size() && meter.ok(); ++i) {
    if (i > 0 && meter.Bytes(static_cast<int64_t>(separator.size()))) out.Append(separator);
    if (meter.ok()) out.Append(TextOf(items[i], meter));
  }
  return out;
}

Text Indent(const Text& text, const Text& by, bool first, bool blank) {
  Text out;
  size_t begin = 0;
  for (int64_t line = 0;; ++line) {
    const size_t end = text.bytes().find('\n', begin);
    const size_t size = (end == std::string::npos ? text.size() : end) - begin;
    if ((line > 0 || first) && (size > 0 || blank)) out.Append(by);
    out.Append(text.Part(begin, size));
    if (end == std::string::npos) return out;
    out.Append("\n", text.marks()[end]);
    begin = end + 1;
  }
}

// --- arguments

const std::string* TextArgument(const Arguments& arguments, size_t place, std::string_view name, Meter& meter) {
  const Value* given = arguments.Get(place, name);
  if (given == nullptr || given->is(Kind::kNone)) return nullptr;
  if (given->is(Kind::kText)) return &given->text().bytes();
  meter.Fail(absl::StrCat("the argument '", std::string(name), "' is a ", given->type_name(), "; it must be a str"));
  return nullptr;
}

const Text& NeedText(const Arguments& arguments, size_t place, std::string_view name, Meter& meter) {
  static const Text* const empty = new Text;
  const Value* given = arguments.Get(place, name);
  if (given != nullptr && given->is(Kind::kText)) return given->text();
  meter.Fail(absl::StrCat("the argument '", std::string(name), "' must be a str"));
  return *empty;
}

// "a.b" of an item, as map, selectattr and their like name it.
Value FieldOf(const Value& item, const std::string& path) {
  Value value = item;
  for (size_t begin = 0; begin <= path.size();) {
    const size_t end = std::min(path.find('.', begin), path.size());
    if (!value.is(Kind::kDict) && !value.is(Kind::kNamespace)) return Value();
    const Value* found = value.Find(std::string_view(path).substr(begin, end - begin));
    if (found == nullptr) return Value();
    const Value next = *found;
    value = next;
    begin = end + 1;
  }
  return value;
}

List ListOf(const Value& value, Meter& meter) {
  List items;
  if (value.is(Kind::kList)) {
    items = value.list();
  } else if (value.is(Kind::kDict)) {
    for (const auto& [key, item] : value.dict()) items.push_back(Written(key));
  } else if (value.is(Kind::kText)) {
    const std::vector<size_t> starts = CharacterStarts(value.text().bytes());
    if (!meter.Steps(static_cast<int64_t>(starts.size()))) return items;
    for (size_t i = 0; i + 1 < starts.size(); ++i)
      items.push_back(Value::Of(value.text().Part(starts[i], starts[i + 1] - starts[i])));
  } else if (!value.is(Kind::kUndefined)) {
    meter.Fail(absl::StrCat("a ", value.type_name(), " has no items"));
  }
  meter.Steps(static_cast<int64_t>(items.size()));
  return items;
}

Value ItemsOf(const Value& dict) {
  List items;
  for (const auto& [key, value] : dict.dict()) items.push_back(Value::Of(List{Written(key), value}));
  return Value::Of(std::move(items));
}

// select, reject, selectattr, rejectattr: test and its arguments from `first` on.
Value Choose(const Value& input, const Arguments& arguments, bool by_attribute, bool keep, Meter& meter) {
  const size_t first = by_attribute ? 1 : 0;
  const std::string attribute = by_attribute ? NeedText(arguments, 0, "attribute", meter).bytes() : "";
  std::string test;
  Arguments rest;
  if (arguments.values.size() > first) test = NeedText(arguments, first, "test", meter).bytes();
  for (size_t i = first + 1; i < arguments.values.size(); ++i) rest.values.push_back(arguments.values[i]);
  List kept;
  for (const Value& item : input.truthy() ? ListOf(input, meter) : List()) {
    if (!meter.ok()) break;
    const Value value = by_attribute ? FieldOf(item, attribute) : item;
    const bool holds = test.empty() ? value.truthy() : ApplyTest(test, value, rest, meter);
    if (holds == keep) kept.push_back(item);
  }
  return meter.Checked(Value::Of(std::move(kept)));
}

Value Map(const Value& input, const Arguments& arguments, Meter& meter) {
  List mapped;
  const Value* attribute = arguments.Get(SIZE_MAX, "attribute");
  const Value* fallback = arguments.Get(SIZE_MAX, "default");
  Arguments rest;
  if (attribute == nullptr) {
    const std::string& filter = NeedText(arguments, 0, "filter", meter).bytes();
    rest.values.assign(arguments.values.begin() + (arguments.values.empty() ? 0 : 1), arguments.values.end());
    for (const Value& item : input.truthy() ? ListOf(input, meter) : List()) {
      if (!meter.ok()) break;
      mapped.push_back(ApplyFilter(filter, item, rest, meter));
    }
  } else {
    const std::string path = TextOf(*attribute, meter).bytes();
    for (const Value& item : input.truthy() ? ListOf(input, meter) : List()) {
      Value value = FieldOf(item, path);
      mapped.push_back(value.is(Kind::kUndefined) && fallback != nullptr ? *fallback : std::move(value));
    }
  }
  return meter.Checked(Value::Of(std::move(mapped)));
}

Value ToInt(const Value& input, int64_t fallback) {
  if (input.is(Kind::kFloat)) {
    return Value::Int(std::isfinite(input.number()) && std::abs(input.number()) < 9e18 ? static_cast<int64_t>(input.number())
                                                                                       : fallback);
  }
  if (input.is_number()) return Value::Int(input.integer());
  if (!input.is(Kind::kText)) return Value::Int(fallback);
  const std::string text = Strip(input.text(), nullptr, true, true).bytes();
  char* end = nullptr;
  errno = 0;
  const int64_t value = std::strtoll(text.c_str(), &end, 10);
  return Value::Int(text.empty() || *end != '\0' || errno != 0 ? fallback : value);
}

Value ToFloat(const Value& input, double fallback) {
  if (input.is_number()) return Value::Float(input.number());
  if (!input.is(Kind::kText)) return Value::Float(fallback);
  const std::string text = Strip(input.text(), nullptr, true, true).bytes();
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  return Value::Float(text.empty() || *end != '\0' ? fallback : value);
}

Value ToJsonFilter(const Value& input, const Arguments& arguments, Meter& meter) {
  const int64_t indent = arguments.Int(1, "indent", -1, meter);
  if (indent > 16) meter.Fail(absl::StrCat("tojson: indent is ", indent, "; at most 16 is accepted"));
  // Escapes take up to six bytes, and each part a line with its indent.
  if (!meter.ok() || !meter.Bytes(input.weight() * (6 + 2 * std::max<int64_t>(0, indent) * input.depth()))) return Value();
  return Value::Of(ToJson(input, static_cast<int>(indent)));
}

using Filter = Value (*)(const Value&, const Arguments&, Meter&);
const absl::flat_hash_map<std::string, Filter>& Filters() {
  using V = const Value&;
  using A = const Arguments&;
  static const auto* const filters = new absl::flat_hash_map<std::string, Filter>{
      {"abs",
       [](V v, A, Meter& m) {
         return v.is(Kind::kFloat)                 ? Value::Float(std::abs(v.number()))
                : v.is_number() && v.integer() < 0 ? Value::Int(static_cast<int64_t>(0 - static_cast<uint64_t>(v.integer())))
                                                   : v;
       }},
      {"capitalize", [](V v, A, Meter& m) { return Value::Of(Capitalize(TextOf(v, m))); }},
      {"default",
       [](V v, A a, Meter& m) {
         const Value* fallback = a.Get(0, "default_value");
         const Value* falsy = a.Get(1, "boolean");
         const bool replaced = v.is(Kind::kUndefined) || (falsy != nullptr && falsy->truthy() && !v.truthy());
         return !replaced ? v : fallback != nullptr ? *fallback : Written("");
       }},
      {"first",
       [](V v, A, Meter& m) {
         const List items = ListOf(v, m);
         return items.empty() ? Value() : items.front();
       }},
      {"float",
       [](V v, A a, Meter& m) {
         const Value* f = a.Get(0, "default");
         return ToFloat(v, f != nullptr && f->is_number() ? f->number() : 0.0);
       }},
      {"indent",
       [](V v, A a, Meter& m) {
         const Value* width = a.Get(0, "width");
         const Value* first = a.Get(1, "first");
         const Value* blank = a.Get(2, "blank");
         Text by(std::string(4, ' '), false);
         if (width != nullptr && width->is(Kind::kText)) by = width->text();
         if (width != nullptr && width->is(Kind::kInt))
           by = Text(std::string(static_cast<size_t>(std::clamp<int64_t>(width->integer(), 0, 256)), ' '), false);
         const Text text = TextOf(v, m);
         const auto lines = std::count(text.bytes().begin(), text.bytes().end(), '\n') + 1;
         if (!m.Bytes(lines * static_cast<int64_t>(by.size() + 1))) return Value();
         return Value::Of(Indent(text, by, first != nullptr && first->truthy(), blank != nullptr && blank->truthy()));
       }},
      {"int", [](V v, A a, Meter& m) { return ToInt(v, a.Int(0, "default", 0, m)); }},
      {"items",
       [](V v, A, Meter& m) {
         return v.is(Kind::kDict) && m.Steps(static_cast<int64_t>(v.dict().size())) ? m.Checked(ItemsOf(v)) : Value::Of(List{});
       }},
      {"join",
       [](V v, A a, Meter& m) {
         const Value* separator = a.Get(0, "d");
         const Value* attribute = a.Get(1, "attribute");
         List items = ListOf(v, m);
         if (attribute != nullptr && attribute->is(Kind::kText)) {
           for (Value& item : items) item = FieldOf(item, attribute->text().bytes());
         }
         return Value::Of(Join(items, separator == nullptr ? Text() : TextOf(*separator, m), m));
       }},
      {"last",
       [](V v, A, Meter& m) {
         const List items = ListOf(v, m);
         return items.empty() ? Value() : items.back();
       }},
      {"length",
       [](V v, A, Meter& m) {
         if (v.is(Kind::kText)) return Value::Int(CharacterCount(v.text().bytes()));
         if (v.is(Kind::kList)) return Value::Int(static_cast<int64_t>(v.list().size()));
         if (v.is(Kind::kDict)) return Value::Int(static_cast<int64_t>(v.dict().size()));
         if (!v.is(Kind::kUndefined)) m.Fail(absl::StrCat("a ", v.type_name(), " has no length"));
         return Value::Int(0);
       }},
      {"list", [](V v, A, Meter& m) { return m.Checked(Value::Of(ListOf(v, m))); }},
      {"lower", [](V v, A, Meter& m) { return Value::Of(Lower(TextOf(v, m))); }},
      {"map", Map},
      {"reject", [](V v, A a, Meter& m) { return Choose(v, a, false, false, m); }},
      {"rejectattr", [](V v, A a, Meter& m) { return Choose(v, a, true, false, m); }},
      {"replace",
       [](V v, A a, Meter& m) {
         const Text text = TextOf(v, m);
         const std::string& from = NeedText(a, 0, "old", m).bytes();
         const Text& to = NeedText(a, 1, "new", m);
         return Value::Of(Replace(text, from, to, a.Int(2, "count", -1, m), m));
       }},
      {"reverse",
       [](V v, A, Meter& m) {
         List items = ListOf(v, m);
         std::reverse(items.begin(), items.end());
         return v.is(Kind::kText) ? Value::Of(Join(items, Text(), m)) : m.Checked(Value::Of(std::move(items)));
       }},
      {"round",
       [](V v, A a, Meter& m) {
         const double by = std::pow(10.0, static_cast<double>(a.Int(0, "precision", 0, m)));
         return Value::Float(std::nearbyint(v.is_number() ? v.number() * by : 0) / by);
       }},
      {"safe", [](V v, A, Meter& m) { return Value::Of(TextOf(v, m)); }},
      {"select", [](V v, A a, Meter& m) { return Choose(v, a, false, true, m); }},
      {"selectattr", [](V v, A a, Meter& m) { return Choose(v, a, true, true, m); }},
      {"string", [](V v, A, Meter& m) { return Value::Of(TextOf(v, m)); }},
      {"title", [](V v, A, Meter& m) { return Value::Of(Title(TextOf(v, m))); }},
      {"tojson", ToJsonFilter},
      {"trim", [](V v, A a, Meter& m) { return Value::Of(Strip(TextOf(v, m), TextArgument(a, 0, "chars", m), true, true)); }},
      {"upper", [](V v, A, Meter& m) { return Value::Of(Upper(TextOf(v, m))); }},
  };
  return *filters;
}

std::string FilterName(std::string_view name) {
  if (name == "count") return "length";
  if (name == "d") return "default";
  return std::string(name);
}

using Test = bool (*)(const Value&, const Value*, Meter&);
const absl::flat_hash_map<std::string, Test>& Tests() {
  using V = const Value&;
  using O = const Value*;
  static const auto equals = [](V v, O o, Meter& m) {
    return o != nullptr && m.Steps(std::min(v.weight(), o->weight()) / 64) && Equal(v, *o);
  };
  static const auto* const tests = new absl::flat_hash_map<std::string, Test>{
      {"boolean", [](V v, O, Meter&) { return v.is(Kind::kBool); }},
      {"callable", [](V v, O, Meter&) { return v.is(Kind::kMacro) || v.is(Kind::kFunction); }},
      {"defined", [](V v, O, Meter&) { return !v.is(Kind::kUndefined); }},
      {"divisibleby",
       [](V v, O o, Meter&) {
         return o != nullptr && v.is(Kind::kInt) && o->is(Kind::kInt) && o->integer() > 0 && v.integer() % o->integer() == 0;
       }},
      {"equalto", [](V v, O o, Meter& m) { return equals(v, o, m); }},
      {"even", [](V v, O, Meter&) { return v.is(Kind::kInt) && v.integer() % 2 == 0; }},
      {"false", [](V v, O, Meter&) { return v.is(Kind::kBool) && !v.truthy(); }},
      {"float", [](V v, O, Meter&) { return v.is(Kind::kFloat); }},
      {"ge", [](V v, O o, Meter& m) { return o != nullptr && Compare(v, *o, m) >= 0; }},
      {"gt", [](V v, O o, Meter& m) { return o != nullptr && Compare(v, *o, m) > 0; }},
      {"in", [](V v, O o, Meter& m) { return o != nullptr && Contains(*o, v, m); }},
      {"integer", [](V v, O, Meter&) { return v.is(Kind::kInt); }},
      {"iterable",
       [](V v, O, Meter&) { return v.is(Kind::kText) || v.is(Kind::kList) || v.is(Kind::kDict) || v.is(Kind::kUndefined); }},
      {"le", [](V v, O o, Meter& m) { return o != nullptr && Compare(v, *o, m) <= 0; }},
      {"lt", [](V v, O o, Meter& m) { return o != nullptr && Compare(v, *o, m) < 0; }},
      {"mapping", [](V v, O, Meter&) { return v.is(Kind::kDict); }},
      {"ne", [](V v, O o, Meter& m) { return !equals(v, o, m); }},
      {"none", [](V v, O, Meter&) { return v.is(Kind::kNone); }},
      {"number", [](V v, O, Meter&) { return v.is_number(); }},
      {"odd", [](V v, O, Meter&) { return v.is(Kind::kInt) && v.integer() % 2 != 0; }},
      {"sequence",
       [](V v, O, Meter&) { return v.is(Kind::kText) || v.is(Kind::kList) || v.is(Kind::kDict) || v.is(Kind::kUndefined); }},
      {"string", [](V v, O, Meter&) { return v.is(Kind::kText); }},
      {"true", [](V v, O, Meter&) { return v.is(Kind::kBool) && v.truthy(); }},
      {"undefined", [](V v, O, Meter&) { return v.is(Kind::kUndefined); }},
  };
  return *tests;
}

std::string TestName(std::string_view name) {
  if (name == "eq" || name == "==" || name == "sameas") return "equalto";
  if (name == "!=") return "ne";
  if (name == ">") return "gt";
  if (name == ">=") return "ge";
  if (name == "<") return "lt";
  if (name == "<=") return "le";
  return std::string(name);
}

bool StartsOrEnds(const Text& text, const Value* with, bool starts, Meter& meter) {
  const auto one = [&](const Value& part) {
    if (!part.is(Kind::kText)) {
      meter.Fail("startswith and endswith need a str");
      return false;
    }
    const std::string& bytes = part.text().bytes();
    return starts ? text.bytes().starts_with(bytes) : text.bytes().ends_with(bytes);
  };
  if (with == nullptr) {
    meter.Fail("startswith and endswith need a str");
    return false;
  }
  if (!with->is(Kind::kList)) return one(*with);
  return std::any_of(with->list().begin(), with->list().end(), one);
}

template <typename Is>
bool AllCharacters(const Text& text, const Is& is) {
  for (size_t at = 0; at < text.size(); at += CharacterBytes(std::string_view(text.bytes()).substr(at))) {
    if (!is(CharacterAt(std::string_view(text.bytes()).substr(at)))) return false;
  }
  return !text.empty();
}

Value CallTextMethod(const Value& object, const std::string& name, const Arguments& a, Meter& meter) {
  const Text& text = object.text();
  if (!meter.Bytes(static_cast<int64_t>(text.size()))) return Value();
  const auto find = [&](bool first) {
    const std::string& part = NeedText(a, 0, "sub", meter).bytes();
    const size_t at = first ? text.bytes().find(part) : text.bytes().rfind(part);
    return at == std::string::npos ? int64_t{-1} : CharacterCount(text.bytes().substr(0, at));
  };
  const auto split = [&](bool from_left) {
    const std::string* separator = TextArgument(a, 0, "sep", meter);
    const int64_t most = a.Int(1, "maxsplit", -1, meter);
    if (separator != nullptr && separator->empty()) meter.Fail("the separator to split by is empty");
    if (separator == nullptr && !from_left && most >= 0) meter.Fail("rsplit by white space with maxsplit is not known");
    if (!meter.ok()) return Value();
    List parts = from_left || separator == nullptr ? Split(text, separator, most) : SplitFromRight(text, *separator, most);
    return meter.Checked(Value::Of(std::move(parts)));
  };
  if (name == "strip") return Value::Of(Strip(text, TextArgument(a, 0, "chars", meter), true, true));
  if (name == "lstrip") return Value::Of(Strip(text, TextArgument(a, 0, "chars", meter), true, false));
  if (name == "rstrip") return Value::Of(Strip(text, TextArgument(a, 0, "chars", meter), false, true));
  if (name == "split") return split(true);
  if (name == "rsplit") return split(false);
  if (name == "splitlines") return meter.Checked(Value::Of(SplitLines(text)));
  if (name == "startswith") return Value::Bool(StartsOrEnds(text, a.Get(0, "prefix"), true, meter));
  if (name == "endswith") return Value::Bool(StartsOrEnds(text, a.Get(0, "suffix"), false, meter));
  if (name == "removeprefix" || name == "removesuffix") {
    const std::string& part = NeedText(a, 0, "part", meter).bytes();
    if (name == "removeprefix")
      return text.bytes().starts_with(part) ? Value::Of(text.Part(part.size(), text.size() - part.size())) : object;
    return text.bytes().ends_with(part) ? Value::Of(text.Part(0, text.size() - part.size())) : object;
  }
  if (name == "upper") return Value::Of(Upper(text));
  if (name == "lower") return Value::Of(Lower(text));
  if (name == "title") return Value::Of(Title(text));
  if (name == "capitalize") return Value::Of(Capitalize(text));
  if (name == "replace") return ApplyFilter("replace", object, a, meter);
  if (name == "find") return Value::Int(find(true));
  if (name == "rfind") return Value::Int(find(false));
  if (name == "count") {
    const std::string& part = NeedText(a, 0, "sub", meter).bytes();
    int64_t count = 0;
    for (size_t at = 0; !part.empty() && (at = text.bytes().find(part, at)) != std::string::npos; at += part.size()) ++count;
    return Value::Int(count);
  }
  if (name == "join") {
    const Value* items = a.Get(0, "iterable");
    return items == nullptr ? Value() : Value::Of(Join(ListOf(*items, meter), text, meter));
  }
  if (name == "isspace") return Value::Bool(AllCharacters(text, IsSpace));
  if (name == "isdigit")
    return Value::Bool(AllCharacters(text, [](int32_t c) { return utf8proc_category(c) == UTF8PROC_CATEGORY_ND; }));
  if (name == "isalpha") {
    return Value::Bool(AllCharacters(text, [](int32_t c) {
      return utf8proc_category(c) >= UTF8PROC_CATEGORY_LU && utf8proc_category(c) <= UTF8PROC_CATEGORY_LO;
    }));
  }
  if (name == "isupper") return Value::Bool(Upper(text).bytes() == text.bytes() && Lower(text).bytes() != text.bytes());
  if (name == "islower") return Value::Bool(Lower(text).bytes() == text.bytes() && Upper(text).bytes() != text.bytes());
  Unknown("method", name, object, meter);
  return Value();
}

}  // namespace

void Meter::Fail(absl::string_view what) {
  if (status_.ok()) status_ = absl::InvalidArgumentError(absl::StrCat("line ", line_, ": ", what));
}

bool Meter::Steps(int64_t count) {
  if (!ok()) return false;
  steps_ -= std::max<int64_t>(0, count);
  if (steps_ < 0) Fail(absl::StrCat("takes more than ", limits_.steps, " steps"));
  return ok();
}

bool Meter::Bytes(int64_t count) {
  if (!ok()) return false;
  bytes_ -= std::max<int64_t>(0, count);
  if (bytes_ < 0) Fail(absl::StrCat("makes more than ", limits_.text_bytes, " bytes of text"));
  return ok();
}

Value Meter::Checked(Value value) {
  if (!ok()) return Value();
  int64_t parts = 0;
  bool has_namespace = false;
  if (value.is(Kind::kList)) {
    parts = static_cast<int64_t>(value.list().size());
    for (const Value& part : value.list()) has_namespace = has_namespace || part.is(Kind::kNamespace);
  } else if (value.is(Kind::kDict) || value.is(Kind::kNamespace)) {
    parts = static_cast<int64_t>(value.dict().size());
    for (const auto& [key, part] : value.dict()) has_namespace = has_namespace || part.is(Kind::kNamespace);
  }
  if (has_namespace) Fail("a namespace cannot be part of another value");
  if (value.depth() > kMaxDepth) Fail(absl::StrCat("lists and dicts are nested more than ", kMaxDepth, " deep"));
  return Steps(parts) ? value : Value();
}

const Value* Arguments::Get(size_t place, std::string_view name) const {
  if (place < values.size()) return &values[place];
  for (const auto& [key, value] : named) {
    if (key == name) return &value;
  }
  return nullptr;
}

int64_t Arguments::Int(size_t place, std::string_view name, int64_t fallback, Meter& meter) const {
  const Value* given = Get(place, name);
  if (given == nullptr || given->is(Kind::kNone) || given->is(Kind::kUndefined)) return fallback;
  if (given->is_number() && !given->is(Kind::kFloat)) return given->integer();
  meter.Fail(absl::StrCat("the argument '", std::string(name), "' is a ", given->type_name(), "; it must be an int"));
  return fallback;
}

bool IsFilter(std::string_view name) { return Filters().contains(FilterName(name)); }
bool IsTest(std::string_view name) { return Tests().contains(TestName(name)); }

Value ApplyFilter(const std::string& name, const Value& input, const Arguments& arguments, Meter& meter) {
  const auto it = Filters().find(FilterName(name));
  if (it == Filters().end()) {
    meter.Fail(absl::StrCat("the filter '", name, "' is not known"));
    return Value();
  }
  return meter.Steps(1) ? it->second(input, arguments, meter) : Value();
}

bool ApplyTest(const std::string& name, const Value& input, const Arguments& arguments, Meter& meter) {
  const auto it = Tests().find(TestName(name));
  if (it == Tests().end()) {
    meter.Fail(absl::StrCat("the test '", name, "' is not known"));
    return false;
  }
  return meter.Steps(1) && it->second(input, arguments.Get(0, "other"), meter);
}

Value CallMethod(const Value& object, const std::string& name, const Arguments& arguments, Meter& meter) {
  if (object.is(Kind::kText)) return CallTextMethod(object, name, arguments, meter);
  if (object.is(Kind::kDict)) {
    if (!meter.Steps(static_cast<int64_t>(object.dict().size()))) return Value();
    if (name == "items") return meter.Checked(ItemsOf(object));
    if (name == "keys") return meter.Checked(Value::Of(ListOf(object, meter)));
    if (name == "values") {
      List values;
      for (const auto& [key, value] : object.dict()) values.push_back(value);
      return meter.Checked(Value::Of(std::move(values)));
    }
    if (name == "get") {
      const Value* found = object.Find(NeedText(arguments, 0, "key", meter).bytes());
      const Value* fallback = arguments.Get(1, "default");
      return found != nullptr ? *found : fallback != nullptr ? *fallback : Value::None();
    }
  }
  if (object.is(Kind::kList) && (name == "index" || name == "count") && !arguments.values.empty()) {
    int64_t count = 0;
    for (size_t i = 0; i < object.list().size(); ++i) {
      const Value& item = object.list()[i];
      if (!meter.Steps(1 + std::min(item.weight(), arguments.values[0].weight()) / 64)) return Value();
      if (!Equal(item, arguments.values[0])) continue;
      if (name == "index") return Value::Int(static_cast<int64_t>(i));
      ++count;
    }
    if (name == "count") return Value::Int(count);
    meter.Fail("index: the list has no such item");
    return Value();
  }
  Unknown("method", name, object, meter);
  return Value();
}

Value CallFunction(const std::string& name, const Arguments& arguments, Meter& meter) {
  if (name == "raise_exception") {
    const Value* message = arguments.Get(0, "message");
    meter.Fail(
        absl::StrCat("the template refuses it: ", message == nullptr ? "" : TextOf(*message, meter).bytes().substr(0, 1000)));
    return Value();
  }
  if (name == "range") {
    int64_t begin = 0, end = arguments.Int(0, "stop", 0, meter);
    if (arguments.values.size() > 1) {
      begin = end;
      end = arguments.Int(1, "stop", 0, meter);
    }
    const int64_t step = arguments.Int(2, "step", 1, meter);
    const double count =
        step == 0 ? 0 : std::ceil((static_cast<double>(end) - static_cast<double>(begin)) / static_cast<double>(step));
    if (step == 0) meter.Fail("range: the step is 0");
    if (count > static_cast<double>(kMaxRange))
      meter.Fail(absl::StrCat("range: has ", count, " numbers; at most ", kMaxRange, " are accepted"));
    List numbers;
    if (!meter.ok() || !meter.Steps(static_cast<int64_t>(std::max(0.0, count)))) return Value();
    for (int64_t i = 0; i < static_cast<int64_t>(count); ++i) numbers.push_back(Value::Int(begin + i * step));
    return Value::Of(std::move(numbers));
  }
  Dict fields;
  if (!arguments.values.empty() && arguments.values[0].is(Kind::kDict)) fields = arguments.values[0].dict();
  for (const auto& [key, value] : arguments.named) fields.emplace_back(key, value);
  return meter.Checked(name == "namespace" ? Value::Namespace(std::move(fields)) : Value::Of(std::move(fields)));
}

Text TextOf(const Value& value, Meter& meter) { return meter.Bytes(2 * value.weight()) ? ToText(value) : Text(); }

Value Add(const Value& left, const Value& right, Meter& meter) {
  if (!meter.ok()) return Value();
  if (left.is(Kind::kText) && right.is(Kind::kText)) {
    if (!meter.Bytes(static_cast<int64_t>(left.text().size() + right.text().size()))) return Value();
    Text text = left.text();
    text.Append(right.text());
    return Value::Of(std::move(text));
  }
  if (left.is(Kind::kList) && right.is(Kind::kList)) {
    if (!meter.Steps(static_cast<int64_t>(left.list().size() + right.list().size()))) return Value();
    List list = left.list();
    list.insert(list.end(), right.list().begin(), right.list().end());
    return Value::Of(std::move(list));
  }
  if (left.is_number() && right.is_number()) {
    if (left.is(Kind::kFloat) || right.is(Kind::kFloat)) return Value::Float(left.number() + right.number());
    int64_t sum = 0;
    if (__builtin_add_overflow(left.integer(), right.integer(), &sum)) meter.Fail("a number is too large");
    return Value::Int(sum);
  }
  meter.Fail(absl::StrCat("a ", left.type_name(), " and a ", right.type_name(), " cannot be added"));
  return Value();
}

bool Contains(const Value& container, const Value& item, Meter& meter) {
  if (container.is(Kind::kText)) {
    if (!item.is(Kind::kText)) {
      meter.Fail(absl::StrCat("a ", item.type_name(), " cannot be looked for in a str"));
      return false;
    }
    return meter.Bytes(static_cast<int64_t>(container.text().size())) &&
           container.text().bytes().find(item.text().bytes()) != std::string::npos;
  }
  if (container.is(Kind::kList)) {
    for (const Value& part : container.list()) {
      if (!meter.Steps(1 + std::min(part.weight(), item.weight()) / 64)) return false;
      if (Equal(part, item)) return true;
    }
    return false;
  }
  if (container.is(Kind::kDict) || container.is(Kind::kNamespace)) {
    return meter.Steps(static_cast<int64_t>(container.dict().size())) && item.is(Kind::kText) &&
           container.Find(item.text().bytes()) != nullptr;
  }
  if (!container.is(Kind::kUndefined)) meter.Fail(absl::StrCat("a ", container.type_name(), " holds nothing to look for"));
  return false;
}

int Compare(const Value& left, const Value& right, Meter& meter) {
  if (left.is(Kind::kText) && right.is(Kind::kText)) {
    const int order = left.text().bytes().compare(right.text().bytes());
    return order < 0 ? -1 : order > 0;
  }
  if (left.is_number() && right.is_number()) {
    if (!left.is(Kind::kFloat) && !right.is(Kind::kFloat))
      return left.integer() < right.integer() ? -1 : left.integer() > right.integer();
    return left.number() < right.number() ? -1 : left.number() > right.number();
  }
  meter.Fail(absl::StrCat("a ", left.type_name(), " and a ", right.type_name(), " have no order"));
  return 0;
}

Value Item(const Value& object, int64_t index, Meter& meter) {
  if (object.is(Kind::kList)) {
    const auto size = static_cast<int64_t>(object.list().size());
    if (index < 0) index += size;
    return index < 0 || index >= size ? Value() : object.list()[static_cast<size_t>(index)];
  }
  if (!meter.Bytes(static_cast<int64_t>(object.text().size()))) return Value();
  const std::vector<size_t> starts = CharacterStarts(object.text().bytes());
  const auto size = static_cast<int64_t>(starts.size()) - 1;
  if (index < 0) index += size;
  if (index < 0 || index >= size) return Value();
  const size_t begin = starts[static_cast<size_t>(index)];
  return Value::Of(object.text().Part(begin, starts[static_cast<size_t>(index) + 1] - begin));
}

Value Slice(const Value& object, const int64_t* begin, const int64_t* end, const int64_t* step, Meter& meter) {
  if (!object.is(Kind::kList) && !object.is(Kind::kText)) {
    meter.Fail(absl::StrCat("a ", object.type_name(), " cannot be sliced"));
    return Value();
  }
  std::vector<size_t> starts;
  if (object.is(Kind::kText)) {
    if (!meter.Bytes(static_cast<int64_t>(object.text().size()))) return Value();
    starts = CharacterStarts(object.text().bytes());
  }
  const int64_t size =
      object.is(Kind::kList) ? static_cast<int64_t>(object.list().size()) : static_cast<int64_t>(starts.size()) - 1;
  const int64_t by = step == nullptr ? 1 : *step;
  if (by == 0) {
    meter.Fail("a slice's step is 0");
    return Value();
  }
  const int64_t low = by > 0 ? 0 : -1;
  const int64_t high = by > 0 ? size : size - 1;
  const auto place = [&](const int64_t* given, int64_t fallback) {
    if (given == nullptr) return fallback;
    const int64_t at = *given < 0 ? (*given < -size ? int64_t{-1} : *given + size) : *given;
    return std::clamp(at, low, std::max(low, high));
  };
  const int64_t from = place(begin, by > 0 ? 0 : size - 1);
  const int64_t to = place(end, by > 0 ? size : -1);
  // A part of a text in one piece.
  if (object.is(Kind::kText) && by == 1) {
    if (from >= to) return Value::Of(Text());
    return Value::Of(
        object.text().Part(starts[static_cast<size_t>(from)], starts[static_cast<size_t>(to)] - starts[static_cast<size_t>(from)]));
  }
  List items;
  Text text;
  for (int64_t i = from; by > 0 ? i < to : i > to;) {
    if (!meter.Steps(1)) return Value();
    if (object.is(Kind::kList))
      items.push_back(object.list()[static_cast<size_t>(i)]);
    else
      text.Append(
          object.text().Part(starts[static_cast<size_t>(i)], starts[static_cast<size_t>(i) + 1] - starts[static_cast<size_t>(i)]));
    if (__builtin_add_overflow(i, by, &i)) break;
  }
  return object.is(Kind::kList) ? Value::Of(std::move(items)) : Value::Of(std::move(text));
}

}  // namespace memserve::engine::jinja
