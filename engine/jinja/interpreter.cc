#include "engine/jinja/interpreter.h"

#include <algorithm>
#include <cmath>
#include <deque>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "engine/jinja/functions.h"

namespace memserve::engine::jinja {
namespace {

constexpr int kMaxDepth = 400;  // of calls inside calls: macros, statements and expressions together

enum class Flow { kOn, kBreak, kContinue };

class Interpreter {
 public:
  Interpreter(const Dict& variables, const Limits& limits) : meter_(limits) {
    scopes_.emplace_back();
    for (const auto& [name, value] : variables) scopes_.back()[name] = value;
    for (const char* name : {"range", "namespace", "dict", "raise_exception"}) scopes_.back().emplace(name, Value::Function(name));
    scopes_.emplace_back();  // the template's own names
  }

  absl::StatusOr<Text> Run(const Body& body) {
    Text out;
    Execute(body, out);
    if (!meter_.ok()) return meter_.status();
    return out;
  }

 private:
  using Scope = absl::flat_hash_map<std::string, Value>;

  // Counts a node and a level; false: the run is over.
  class Level {
   public:
    Level(Interpreter& run, int line) : run_(run) {
      run_.meter_.set_line(line);
      if (++run_.depth_ > kMaxDepth) run_.meter_.Fail(absl::StrCat("is nested more than ", kMaxDepth, " deep while it runs"));
    }
    ~Level() { --run_.depth_; }
    bool ok() const { return run_.meter_.Steps(1); }

   private:
    Interpreter& run_;
  };

  void Output(const Text& text, Text& out) {
    if (!meter_.Bytes(static_cast<int64_t>(text.size()))) return;
    if (static_cast<int64_t>(out.size() + text.size()) > meter_.limits().output_bytes) {
      return meter_.Fail(absl::StrCat("writes more than ", meter_.limits().output_bytes, " bytes"));
    }
    out.Append(text);
  }

  const Value* Find(const std::string& name) const {
    for (size_t i = scopes_.size(); i-- > base_;) {
      if (const auto it = scopes_[i].find(name); it != scopes_[i].end()) return &it->second;
    }
    for (const size_t i : {size_t{1}, size_t{0}}) {
      if (const auto it = scopes_[i].find(name); it != scopes_[i].end()) return &it->second;
    }
    return nullptr;
  }

  Flow Execute(const Body& body, Text& out) {
    for (const Statement& statement : body) {
      const Flow flow = Execute(statement, out);
      if (flow != Flow::kOn || !meter_.ok()) return flow;
    }
    return Flow::kOn;
  }

  Flow Execute(const Statement& s, Text& out) {
    const Level level(*this, s.line);
    if (!level.ok()) return Flow::kOn;
    switch (s.kind) {
      case Statement::Kind::kText:
        Output(s.text, out);
        return Flow::kOn;
      case Statement::Kind::kOutput: {
        const Value value = Evaluate(*s.expression);
        if (meter_.ok()) Output(TextOf(value, meter_), out);
        return Flow::kOn;
      }
      case Statement::Kind::kIf:
        for (const Statement::Branch& branch : s.branches) {
          if (branch.condition == nullptr || Evaluate(*branch.condition).truthy()) return Execute(branch.body, out);
          if (!meter_.ok()) break;
        }
        return Flow::kOn;
      case Statement::Kind::kFor:
        ExecuteFor(s, out);
        return Flow::kOn;
      case Statement::Kind::kSet:
        Assign(s, Evaluate(*s.expression));
        return Flow::kOn;
      case Statement::Kind::kSetBlock: {
        Text inner;
        scopes_.emplace_back();
        Execute(s.body, inner);
        scopes_.pop_back();
        Assign(s, Value::Of(std::move(inner)));
        return Flow::kOn;
      }
      case Statement::Kind::kMacro:
        scopes_.back()[s.names[0]] = Value::Macro(&s);
        return Flow::kOn;
      case Statement::Kind::kBreak:
        return Flow::kBreak;
      case Statement::Kind::kContinue:
        return Flow::kContinue;
      case Statement::Kind::kBlock:
        return Execute(s.body, out);
    }
    return Flow::kOn;
  }

  void Assign(const Statement& s, Value value) {
    if (!meter_.ok()) return;
    if (s.attribute.empty()) return Bind(s.names, std::move(value));
    const Value* target = Find(s.names[0]);
    if (target == nullptr || !target->is(Kind::kNamespace)) {
      return meter_.Fail(absl::StrCat("'", s.names[0], "' is no namespace, so its attributes cannot be set"));
    }
    if (value.is(Kind::kNamespace)) return meter_.Fail("a namespace cannot be part of another");
    for (auto& [name, field] : target->fields()) {
      if (name != s.attribute) continue;
      field = std::move(value);
      return;
    }
    target->fields().emplace_back(s.attribute, std::move(value));
  }

  void Bind(const std::vector<std::string>& names, Value value) {
    if (names.size() == 1) {
      scopes_.back()[names[0]] = std::move(value);
      return;
    }
    if (!value.is(Kind::kList) || value.list().size() != names.size()) {
      return meter_.Fail(absl::StrCat("a ", value.type_name(), " cannot be taken apart into ", names.size(), " names"));
    }
    for (size_t i = 0; i < names.size(); ++i) scopes_.back()[names[i]] = value.list()[i];
  }

  // What a loop goes over: the items of a list, the keys of a dict, the characters of a text.
  List ItemsOf(const Value& value) {
    List items;
    if (value.is(Kind::kList)) {
      items = value.list();
    } else if (value.is(Kind::kDict)) {
      for (const auto& [key, item] : value.dict()) items.push_back(Value::Written(key));
    } else if (value.is(Kind::kText)) {
      const Value list = ApplyFilter("list", value, {}, meter_);
      if (meter_.ok()) items = list.list();
    } else if (!value.is(Kind::kUndefined)) {
      meter_.Fail(absl::StrCat("a ", value.type_name(), " cannot be looped over"));
    }
    meter_.Steps(static_cast<int64_t>(items.size()));
    return items;
  }

  void ExecuteFor(const Statement& s, Text& out) {
    List items = ItemsOf(Evaluate(*s.expression));
    if (s.condition != nullptr) {
      List kept;
      for (Value& item : items) {
        if (!meter_.ok()) return;
        scopes_.emplace_back();
        Bind(s.names, item);
        if (Evaluate(*s.condition).truthy()) kept.push_back(std::move(item));
        scopes_.pop_back();
      }
      items = std::move(kept);
    }
    const auto length = static_cast<int64_t>(items.size());
    for (int64_t i = 0; i < length && meter_.ok(); ++i) {
      scopes_.emplace_back();
      scopes_.back()["loop"] = Value::Of(Dict{{"index", Value::Int(i + 1)},
                                              {"index0", Value::Int(i)},
                                              {"revindex", Value::Int(length - i)},
                                              {"revindex0", Value::Int(length - i - 1)},
                                              {"first", Value::Bool(i == 0)},
                                              {"last", Value::Bool(i + 1 == length)},
                                              {"length", Value::Int(length)},
                                              {"previtem", i == 0 ? Value() : items[i - 1]},
                                              {"nextitem", i + 1 == length ? Value() : items[i + 1]}});
      Bind(s.names, items[i]);
      const Flow flow = Execute(s.body, out);
      scopes_.pop_back();
      if (flow == Flow::kBreak) break;
    }
    if (length == 0 && meter_.ok()) Execute(s.otherwise, out);
  }

  Value Evaluate(const Expression& e) {
    const Level level(*this, e.line);
    if (!level.ok()) return Value();
    switch (e.kind) {
      case Expression::Kind::kLiteral:
        return e.value;
      case Expression::Kind::kName: {
        const Value* found = Find(e.name);
        return found == nullptr ? Value() : *found;
      }
      case Expression::Kind::kList: {
        List list;
        for (const ExpressionPtr& child : e.children) list.push_back(Evaluate(*child));
        return meter_.Checked(Value::Of(std::move(list)));
      }
      case Expression::Kind::kDict: {
        Dict dict;
        for (size_t i = 0; i + 1 < e.children.size() && meter_.ok(); i += 2) {
          const Value key = Evaluate(*e.children[i]);
          if (!key.is(Kind::kText))
            meter_.Fail(absl::StrCat("a dict's key is a ", key.type_name(), "; it must be a str"));
          else
            dict.emplace_back(key.text().bytes(), Evaluate(*e.children[i + 1]));
        }
        return meter_.Checked(Value::Of(std::move(dict)));
      }
      case Expression::Kind::kAttribute:
        return Attribute(Evaluate(*e.children[0]), e.name);
      case Expression::Kind::kItem:
        return Subscript(Evaluate(*e.children[0]), Evaluate(*e.children[1]));
      case Expression::Kind::kSlice:
        return EvaluateSlice(e);
      case Expression::Kind::kCall:
        return EvaluateCall(e);
      case Expression::Kind::kFilter: {
        const Value input = Evaluate(*e.children[0]);
        const Arguments arguments = EvaluateArguments(e);
        meter_.set_line(e.line);
        return meter_.ok() ? ApplyFilter(e.name, input, arguments, meter_) : Value();
      }
      case Expression::Kind::kTest: {
        const Value input = Evaluate(*e.children[0]);
        const Arguments arguments = EvaluateArguments(e);
        return Value::Bool(meter_.ok() && ApplyTest(e.name, input, arguments, meter_));
      }
      case Expression::Kind::kNot:
        return Value::Bool(!Evaluate(*e.children[0]).truthy());
      case Expression::Kind::kNegate: {
        const Value value = Evaluate(*e.children[0]);
        if (value.is(Kind::kFloat)) return Value::Float(-value.number());
        if (value.is_number() && value.integer() != INT64_MIN) return Value::Int(-value.integer());
        if (meter_.ok()) meter_.Fail(absl::StrCat("a ", value.type_name(), " has no negative"));
        return Value();
      }
      case Expression::Kind::kArithmetic:
        return EvaluateArithmetic(e.name, Evaluate(*e.children[0]), Evaluate(*e.children[1]));
      case Expression::Kind::kCompare:
        return EvaluateCompare(e);
      case Expression::Kind::kAnd: {
        Value left = Evaluate(*e.children[0]);
        return left.truthy() ? Evaluate(*e.children[1]) : left;
      }
      case Expression::Kind::kOr: {
        Value left = Evaluate(*e.children[0]);
        return left.truthy() ? left : Evaluate(*e.children[1]);
      }
      case Expression::Kind::kIf:
        if (Evaluate(*e.children[0]).truthy()) return Evaluate(*e.children[1]);
        return e.children[2] == nullptr ? Value() : Evaluate(*e.children[2]);
    }
    return Value();
  }

  Arguments EvaluateArguments(const Expression& e) {
    Arguments arguments;
    for (size_t i = 1; i < e.children.size(); ++i) arguments.values.push_back(Evaluate(*e.children[i]));
    for (const auto& [name, value] : e.named) arguments.named.emplace_back(name, Evaluate(*value));
    return arguments;
  }

  Value Attribute(const Value& object, const std::string& name) {
    if (!meter_.ok()) return Value();
    if (object.is(Kind::kUndefined)) {
      meter_.Fail(absl::StrCat("'", name, "' is asked of something undefined"));
      return Value();
    }
    if (!object.is(Kind::kDict) && !object.is(Kind::kNamespace)) return Value();
    const Value* found = object.Find(name);
    return found == nullptr ? Value() : *found;
  }

  Value Subscript(const Value& object, const Value& key) {
    if (!meter_.ok()) return Value();
    if (object.is(Kind::kUndefined)) {
      meter_.Fail("an item is asked of something undefined");
      return Value();
    }
    if (key.is(Kind::kText)) return Attribute(object, key.text().bytes());
    if (key.is_number() && !key.is(Kind::kFloat) && (object.is(Kind::kList) || object.is(Kind::kText))) {
      return Item(object, key.integer(), meter_);
    }
    return Value();
  }

  Value EvaluateSlice(const Expression& e) {
    const Value object = Evaluate(*e.children[0]);
    int64_t parts[3];
    const int64_t* given[3] = {nullptr, nullptr, nullptr};
    for (int i = 0; i < 3 && meter_.ok(); ++i) {
      if (e.children[i + 1] == nullptr) continue;
      const Value part = Evaluate(*e.children[i + 1]);
      if (part.is(Kind::kNone)) continue;
      if (!part.is(Kind::kInt)) {
        meter_.Fail(absl::StrCat("a slice has a ", part.type_name(), "; it must be an int"));
        break;
      }
      parts[i] = part.integer();
      given[i] = &parts[i];
    }
    return meter_.ok() ? Slice(object, given[0], given[1], given[2], meter_) : Value();
  }

  Value EvaluateCall(const Expression& e) {
    const Expression& callee = *e.children[0];
    // object.method(…): unless the object has a macro of that name.
    if (callee.kind == Expression::Kind::kAttribute) {
      const Value object = Evaluate(*callee.children[0]);
      if (!meter_.ok()) return Value();
      const Value* field = object.is(Kind::kDict) || object.is(Kind::kNamespace) ? object.Find(callee.name) : nullptr;
      const Arguments arguments = EvaluateArguments(e);
      if (!meter_.ok()) return Value();
      meter_.set_line(e.line);
      if (field != nullptr && field->is(Kind::kMacro)) return CallMacro(*field->macro(), arguments);
      return CallMethod(object, callee.name, arguments, meter_);
    }
    const Value function = Evaluate(callee);
    const Arguments arguments = EvaluateArguments(e);
    if (!meter_.ok()) return Value();
    meter_.set_line(e.line);
    if (function.is(Kind::kMacro)) return CallMacro(*function.macro(), arguments);
    if (function.is(Kind::kFunction)) return CallFunction(function.text().bytes(), arguments, meter_);
    meter_.Fail(callee.kind == Expression::Kind::kName && function.is(Kind::kUndefined)
                    ? absl::StrCat("'", callee.name, "' is not known")
                    : absl::StrCat("a ", function.type_name(), " cannot be called"));
    return Value();
  }

  // A macro sees its parameters and the template's own names, not those round its call.
  Value CallMacro(const Statement& macro, const Arguments& arguments) {
    Scope scope;
    for (size_t i = 0; i < macro.parameters.size() && meter_.ok(); ++i) {
      const auto& [name, fallback] = macro.parameters[i];
      const Value* given = arguments.Get(i, name);
      scope[name] = given != nullptr ? *given : fallback != nullptr ? Evaluate(*fallback) : Value();
    }
    if (arguments.values.size() > macro.parameters.size()) {
      meter_.Fail(absl::StrCat("the macro '", macro.names[0], "' takes ", macro.parameters.size(), " arguments, not ",
                               arguments.values.size()));
    }
    if (!meter_.ok()) return Value();
    scopes_.push_back(std::move(scope));
    const size_t base = std::exchange(base_, scopes_.size() - 1);
    Text out;
    Execute(macro.body, out);
    base_ = base;
    scopes_.pop_back();
    return Value::Of(std::move(out));
  }

  Value EvaluateArithmetic(const std::string& op, const Value& left, const Value& right) {
    if (!meter_.ok()) return Value();
    if (op == "~") return Add(Value::Of(TextOf(left, meter_)), Value::Of(TextOf(right, meter_)), meter_);
    if (op == "+") return Add(left, right, meter_);
    if (op == "*" && left.is(Kind::kText) && right.is(Kind::kInt)) return Repeat(left, right.integer());
    if (op == "*" && left.is(Kind::kInt) && right.is(Kind::kText)) return Repeat(right, left.integer());
    if (!left.is_number() || !right.is_number()) {
      meter_.Fail(absl::StrCat("'", op, "' means nothing between a ", left.type_name(), " and a ", right.type_name()));
      return Value();
    }
    if (op == "/" || op == "//" || op == "%") {
      if (right.number() == 0) {
        meter_.Fail("a division by zero");
        return Value();
      }
      if (op == "/") return Value::Float(left.number() / right.number());
    }
    if (op == "**") return Value::Float(std::pow(left.number(), right.number()));
    if (left.is(Kind::kFloat) || right.is(Kind::kFloat)) {
      const double a = left.number(), b = right.number();
      if (op == "-") return Value::Float(a - b);
      if (op == "*") return Value::Float(a * b);
      if (op == "//") return Value::Float(std::floor(a / b));
      return Value::Float(a - b * std::floor(a / b));
    }
    const int64_t a = left.integer(), b = right.integer();
    int64_t result = 0;
    bool overflow = false;
    if (op == "-")
      overflow = __builtin_sub_overflow(a, b, &result);
    else if (op == "*")
      overflow = __builtin_mul_overflow(a, b, &result);
    else if (b == -1)
      overflow = op == "//" && __builtin_sub_overflow(int64_t{0}, a, &result);
    else if (op == "//")
      result = a / b - (a % b != 0 && (a < 0) != (b < 0));
    else
      result = a % b + (a % b != 0 && (a < 0) != (b < 0) ? b : 0);
    if (overflow) meter_.Fail("a number is too large");
    return Value::Int(result);
  }

  Value Repeat(const Value& text, int64_t times) {
    Text out;
    if (times <= 0 || text.text().empty()) return Value::Of(std::move(out));
    const auto size = static_cast<int64_t>(text.text().size());
    if (times > meter_.limits().text_bytes / size || !meter_.Bytes(times * size)) {
      meter_.Fail(absl::StrCat("makes more than ", meter_.limits().text_bytes, " bytes of text"));
      return Value();
    }
    for (int64_t i = 0; i < times; ++i) out.Append(text.text());
    return Value::Of(std::move(out));
  }

  Value EvaluateCompare(const Expression& e) {
    Value left = Evaluate(*e.children[0]);
    for (size_t i = 0; i < e.operators.size(); ++i) {
      Value right = Evaluate(*e.children[i + 1]);
      if (!meter_.ok()) return Value();
      const std::string& op = e.operators[i];
      bool holds = false;
      if (op == "==" || op == "!=") {
        holds = meter_.Steps(std::min(left.weight(), right.weight()) / 64) && Equal(left, right) == (op == "==");
      } else if (op == "in" || op == "not in") {
        holds = Contains(right, left, meter_) == (op == "in");
      } else {
        const int order = Compare(left, right, meter_);
        holds = op == "<" ? order < 0 : op == "<=" ? order <= 0 : op == ">" ? order > 0 : order >= 0;
      }
      if (!holds || !meter_.ok()) return Value::Bool(false);
      left = std::move(right);
    }
    return Value::Bool(true);
  }

  Meter meter_;
  std::deque<Scope> scopes_;  // what is known before the template, its own names, then loops and macros inside
  size_t base_ = 1;           // the first scope that is seen beside those two
  int depth_ = 0;
};

}  // namespace

absl::StatusOr<Text> Run(const Body& body, const Dict& variables, const Limits& limits) {
  return Interpreter(variables, limits).Run(body);
}

}  // namespace memserve::engine::jinja
