// A template as a tree. Built by parser.cc, walked by interpreter.cc.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/jinja/value.h"

namespace memserve::engine::jinja {

struct Expression;
using ExpressionPtr = std::unique_ptr<Expression>;

struct Expression {
  enum class Kind {
    kLiteral,    // value
    kName,       // name
    kList,       // children
    kDict,       // children: key, value, key, value …
    kAttribute,  // children[0].name
    kItem,       // children[0][children[1]]
    kSlice,      // children[0][children[1]:children[2]:children[3]]; null: left out
    kCall,       // children[0](children[1], …, named)
    kFilter,     // children[0] | name(children[1], …, named)
    kTest,       // children[0] is name(children[1], …)
    kNot,
    kNegate,
    kArithmetic,  // name: + - * / // % ** ~
    kCompare,     // children[0] operators[0] children[1] operators[1] …
    kAnd,
    kOr,
    kIf,  // children[1] if children[0] else children[2]; null: left out
  };
  Kind kind;
  int line = 0;
  int depth = 1;  // of the tree below, this included
  std::string name;
  Value value;
  std::vector<ExpressionPtr> children;
  std::vector<std::pair<std::string, ExpressionPtr>> named;
  std::vector<std::string> operators;
};

struct Statement;
using Body = std::vector<Statement>;

struct Statement {
  enum class Kind {
    kText,      // text
    kOutput,    // {{ expression }}
    kIf,        // branches; the last may have no condition
    kFor,       // names in expression if condition; body, otherwise
    kSet,       // names = expression, or attribute of names[0]
    kSetBlock,  // names[0] = body
    kMacro,     // names[0](parameters): body
    kBreak,
    kContinue,
    kBlock,  // body, as it is
  };
  struct Branch {
    ExpressionPtr condition;
    Body body;
  };
  Kind kind;
  int line = 0;
  Text text;
  std::vector<std::string> names;
  std::string attribute;
  ExpressionPtr expression;
  ExpressionPtr condition;
  Body body;
  Body otherwise;
  std::vector<Branch> branches;
  std::vector<std::pair<std::string, ExpressionPtr>> parameters;  // with their defaults, or null
};

// With trim_blocks and lstrip_blocks, as chat templates are written for. INVALID_ARGUMENT gives the line.
absl::StatusOr<Body> Parse(const std::string& source);

}  // namespace memserve::engine::jinja
