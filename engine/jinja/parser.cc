#include <algorithm>
#include <charconv>

#include "absl/strings/str_cat.h"
#include "engine/jinja/syntax.h"
#include "engine/tokenizer/utf8.h"

namespace memserve::engine::jinja {
namespace {

constexpr size_t kMaxSourceBytes = 1 << 20;
constexpr int kMaxDepth = 100;  // of nested expressions and of nested statements

struct Token {
  enum class Kind { kText, kOutputBegin, kOutputEnd, kBlockBegin, kBlockEnd, kName, kString, kInt, kFloat, kOperator, kEnd };
  Kind kind;
  int line;
  std::string text;
  int64_t integer = 0;
  double number = 0;
};

bool IsSpace(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
bool IsDigit(char c) { return c >= '0' && c <= '9'; }
bool IsNameStart(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }

absl::Status ErrorAt(int line, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("line ", line, ": ", what));
}

void AppendCharacter(std::string& out, uint32_t c) {
  if (c < 0x80) {
    out += static_cast<char>(c);
  } else if (c < 0x800) {
    out += static_cast<char>(0xc0 | c >> 6);
    out += static_cast<char>(0x80 | (c & 0x3f));
  } else if (c < 0x10000) {
    out += static_cast<char>(0xe0 | c >> 12);
    out += static_cast<char>(0x80 | (c >> 6 & 0x3f));
    out += static_cast<char>(0x80 | (c & 0x3f));
  } else {
    out += static_cast<char>(0xf0 | c >> 18);
    out += static_cast<char>(0x80 | (c >> 12 & 0x3f));
    out += static_cast<char>(0x80 | (c >> 6 & 0x3f));
    out += static_cast<char>(0x80 | (c & 0x3f));
  }
}

class Lexer {
 public:
  explicit Lexer(std::string source) : source_(std::move(source)) {}

  absl::StatusOr<std::vector<Token>> Run() {
    while (at_ < source_.size() && status_.ok()) ReadText();
    if (!status_.ok()) return status_;
    Add(Token::Kind::kEnd, "");
    return std::move(tokens_);
  }

 private:
  void Fail(absl::string_view what) {
    if (status_.ok()) status_ = ErrorAt(line_, what);
  }
  void Add(Token::Kind kind, std::string text) { tokens_.push_back({kind, line_, std::move(text)}); }
  bool At(std::string_view what) const { return std::string_view(source_).substr(at_).starts_with(what); }
  void Advance(size_t to) {
    line_ +=
        static_cast<int>(std::count(source_.begin() + static_cast<int64_t>(at_), source_.begin() + static_cast<int64_t>(to), '\n'));
    at_ = to;
  }

  // Text up to the next tag, then the tag.
  void ReadText() {
    size_t open = at_;
    while (true) {
      open = source_.find('{', open);
      if (open == std::string::npos || open + 1 >= source_.size()) {
        open = std::string::npos;
        break;
      }
      if (const char next = source_[open + 1]; next == '{' || next == '%' || next == '#') break;
      ++open;
    }
    std::string text = source_.substr(at_, open == std::string::npos ? open : open - at_);
    if (open == std::string::npos) {
      if (!text.empty()) Add(Token::Kind::kText, std::move(text));
      at_ = source_.size();
      return;
    }
    const char sign = open + 2 < source_.size() ? source_[open + 2] : '\0';
    const char kind = source_[open + 1];
    if (sign == '-') {
      while (!text.empty() && IsSpace(text.back())) text.pop_back();
    } else if (sign != '+' && kind != '{') {
      // lstrip_blocks: blanks between the beginning of the line and the tag.
      const size_t newline = text.rfind('\n');
      const size_t begin = newline == std::string::npos ? 0 : newline + 1;
      const bool starts_line = newline != std::string::npos || line_starts_;
      if (starts_line && std::all_of(text.begin() + static_cast<int64_t>(begin), text.end(), IsSpace)) text.resize(begin);
    }
    if (!text.empty()) Add(Token::Kind::kText, std::move(text));
    Advance(open + 2 + (sign == '-' || (sign == '+' && kind != '{') ? 1 : 0));
    if (kind == '#') return ReadComment();
    Add(kind == '{' ? Token::Kind::kOutputBegin : Token::Kind::kBlockBegin, "");
    const size_t first = tokens_.size();
    ReadTag(kind == '{' ? "}}" : "%}", kind == '{' ? Token::Kind::kOutputEnd : Token::Kind::kBlockEnd);
    if (kind == '%' && status_.ok() && tokens_.size() == first + 2 && tokens_[first].text == "raw") ReadRaw();
  }

  void ReadComment() {
    const size_t end = source_.find("#}", at_);
    if (end == std::string::npos) return Fail("a comment is not closed");
    const bool strips = end > at_ && source_[end - 1] == '-';
    const bool keeps = end > at_ && source_[end - 1] == '+';
    Advance(end + 2);
    AfterTag(strips, !keeps);
  }

  // Everything up to {% endraw %} is text.
  void ReadRaw() {
    tokens_.resize(tokens_.size() - 3);
    for (size_t open = at_; (open = source_.find("{%", open)) != std::string::npos; open += 2) {
      size_t name = open + 2;
      const bool strips_before = name < source_.size() && source_[name] == '-';
      if (strips_before || (name < source_.size() && source_[name] == '+')) ++name;
      while (name < source_.size() && IsSpace(source_[name])) ++name;
      if (source_.compare(name, 6, "endraw") != 0) continue;
      size_t end = name + 6;
      while (end < source_.size() && IsSpace(source_[end])) ++end;
      const bool strips_after = end < source_.size() && source_[end] == '-';
      if (strips_after || (end < source_.size() && source_[end] == '+')) ++end;
      if (source_.compare(end, 2, "%}") != 0) continue;
      std::string text = source_.substr(at_, open - at_);
      while (strips_before && !text.empty() && IsSpace(text.back())) text.pop_back();
      if (!text.empty()) Add(Token::Kind::kText, std::move(text));
      Advance(end + 2);
      return AfterTag(strips_after, true);
    }
    Fail("raw is not closed");
  }

  void AfterTag(bool strips, bool trims_newline) {
    line_starts_ = false;
    if (strips) {
      size_t end = at_;
      while (end < source_.size() && IsSpace(source_[end])) ++end;
      line_starts_ = end > at_ && source_[end - 1] == '\n';
      Advance(end);
    } else if (trims_newline && at_ < source_.size() && source_[at_] == '\n') {
      Advance(at_ + 1);
      line_starts_ = true;
    }
  }

  void ReadTag(std::string_view close, Token::Kind end_kind) {
    std::string brackets;  // that are open: inside a dict, }} is two of them
    while (status_.ok()) {
      size_t next = at_;
      while (next < source_.size() && IsSpace(source_[next])) ++next;
      Advance(next);
      if (at_ >= source_.size()) return Fail(absl::StrCat("a tag is not closed; ", std::string(close), " is missing"));
      const bool signed_close = (source_[at_] == '-' || source_[at_] == '+') && source_.compare(at_ + 1, 2, close) == 0;
      if (brackets.empty() && (At(close) || signed_close)) {
        const char sign = signed_close ? source_[at_] : '\0';
        Add(end_kind, "");
        Advance(at_ + (signed_close ? 3 : 2));
        return AfterTag(sign == '-', close == "%}" && sign != '+');
      }
      const char c = source_[at_];
      if (c == '"' || c == '\'') {
        ReadString(c);
      } else if (IsDigit(c)) {
        ReadNumber();
      } else if (IsNameStart(c)) {
        size_t end = at_;
        while (end < source_.size() && (IsNameStart(source_[end]) || IsDigit(source_[end]))) ++end;
        Add(Token::Kind::kName, source_.substr(at_, end - at_));
        at_ = end;
      } else {
        ReadOperator(brackets);
      }
    }
  }

  void ReadOperator(std::string& brackets) {
    for (const char* op : {"//", "**", "==", "!=", "<=", ">=", "+", "-", "*", "/", "%", "~", "<",
                           ">",  "=",  "(",  ")",  "[",  "]",  "{", "}", ",", ".", ":", "|", ";"}) {
      if (!At(op)) continue;
      const char c = op[0];
      if (c == '(' || c == '[' || c == '{') brackets += c;
      if (c == ')' || c == ']' || c == '}') {
        if (brackets.empty()) return Fail(absl::StrCat("there is a '", op, "' too much"));
        brackets.pop_back();
      }
      Add(Token::Kind::kOperator, op);
      at_ += std::string_view(op).size();
      return;
    }
    Fail(absl::StrCat("'", source_.substr(at_, CharacterBytes(std::string_view(source_).substr(at_))), "' means nothing here"));
  }

  void ReadNumber() {
    std::string digits;
    bool is_float = false;
    size_t end = at_;
    for (; end < source_.size(); ++end) {
      const char c = source_[end];
      if (c == '_') continue;
      const bool point = c == '.' && !is_float && end + 1 < source_.size() && IsDigit(source_[end + 1]);
      if (!IsDigit(c) && !point) break;
      is_float = is_float || point;
      digits += c;
    }
    Add(is_float ? Token::Kind::kFloat : Token::Kind::kInt, digits);
    Token& token = tokens_.back();
    const char* last = digits.data() + digits.size();
    const auto error =
        is_float ? std::from_chars(digits.data(), last, token.number).ec : std::from_chars(digits.data(), last, token.integer).ec;
    if (error != std::errc()) return Fail(absl::StrCat("the number ", digits.substr(0, 40), " is too large"));
    at_ = end;
  }

  void ReadString(char quote) {
    std::string text;
    size_t at = at_ + 1;
    for (; at < source_.size() && source_[at] != quote; ++at) {
      if (source_[at] != '\\' || at + 1 >= source_.size()) {
        text += source_[at];
        continue;
      }
      const char c = source_[++at];
      constexpr std::string_view kNames = "ntrbfva0\\'\"";
      constexpr std::string_view kValues{"\n\t\r\b\f\v\a\0\\'\"", 11};
      const size_t named = kNames.find(c);
      const size_t digits = c == 'x' ? 2 : c == 'u' ? 4 : c == 'U' ? 8 : 0;
      if (named != std::string_view::npos) {
        text += kValues[named];
      } else if (c == '\n') {  // goes on in the next line
      } else if (digits > 0) {
        uint32_t code = 0;
        const char* first = source_.data() + at + 1;
        const char* last = source_.data() + std::min(at + 1 + digits, source_.size());
        const auto [end, error] = std::from_chars(first, last, code, 16);
        if (error != std::errc() || end != first + digits || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) {
          return Fail(absl::StrCat("\\", std::string(1, c), " needs ", digits, " hexadecimal digits of a character"));
        }
        AppendCharacter(text, code);
        at += digits;
      } else {
        text += '\\';
        text += c;
      }
    }
    if (at >= source_.size()) return Fail("a string is not closed");
    Add(Token::Kind::kString, std::move(text));
    Advance(at + 1);
  }

  const std::string source_;
  size_t at_ = 0;
  int line_ = 1;
  bool line_starts_ = true;
  std::vector<Token> tokens_;
  absl::Status status_;
};

// Remembers the first error and from there on sees nothing but the end, so that every loop ends.
class Parser {
 public:
  explicit Parser(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

  absl::StatusOr<Body> Run() {
    Body body = ParseBody({});
    if (status_.ok() && Now().kind != Token::Kind::kEnd) Fail(absl::StrCat("'", Now().text, "' is not expected here"));
    if (!status_.ok()) return status_;
    return body;
  }

 private:
  const Token& Now() const { return tokens_[at_]; }
  const Token& Next() const { return tokens_[std::min(at_ + 1, tokens_.size() - 1)]; }
  void Fail(absl::string_view what) {
    if (status_.ok()) status_ = ErrorAt(Now().line, what);
    at_ = tokens_.size() - 1;
  }
  void Skip() {
    if (at_ + 1 < tokens_.size()) ++at_;
  }
  bool IsOperator(std::string_view op) const { return Now().kind == Token::Kind::kOperator && Now().text == op; }
  bool IsName(std::string_view name) const { return Now().kind == Token::Kind::kName && Now().text == name; }
  bool TakeOperator(std::string_view op) {
    if (!IsOperator(op)) return false;
    Skip();
    return true;
  }
  bool TakeName(std::string_view name) {
    if (!IsName(name)) return false;
    Skip();
    return true;
  }
  void Expect(bool taken, absl::string_view what) {
    if (!taken)
      Fail(absl::StrCat(what, " is expected", Now().text.empty() ? "" : absl::StrCat(", not '", Now().text.substr(0, 40), "'")));
  }
  std::string ExpectName() {
    if (Now().kind != Token::Kind::kName) {
      Expect(false, "a name");
      return "";
    }
    std::string name = Now().text;
    Skip();
    return name;
  }
  void ExpectBlockEnd() {
    if (Now().kind != Token::Kind::kBlockEnd) return Expect(false, "%}");
    Skip();
  }

  // --- statements

  bool AtBlock(const std::vector<std::string_view>& names) const {
    return Now().kind == Token::Kind::kBlockBegin && Next().kind == Token::Kind::kName &&
           std::find(names.begin(), names.end(), Next().text) != names.end();
  }

  Body ParseBody(const std::vector<std::string_view>& until) {
    Body body;
    if (++nesting_ > kMaxDepth) Fail(absl::StrCat("statements are nested more than ", kMaxDepth, " deep"));
    while (status_.ok() && Now().kind != Token::Kind::kEnd && !AtBlock(until)) ParseStatement(body);
    if (!until.empty() && Now().kind == Token::Kind::kEnd) Fail(absl::StrCat(std::string(until.back()), " is missing"));
    --nesting_;
    return body;
  }

  void ParseStatement(Body& body) {
    Statement statement;
    statement.line = Now().line;
    if (Now().kind == Token::Kind::kText) {
      statement.kind = Statement::Kind::kText;
      statement.text = Text(Now().text, false);
      Skip();
    } else if (Now().kind == Token::Kind::kOutputBegin) {
      Skip();
      statement.kind = Statement::Kind::kOutput;
      statement.expression = ParseTuple(true);
      if (Now().kind == Token::Kind::kOutputEnd)
        Skip();
      else
        Expect(false, "}}");
    } else if (Now().kind == Token::Kind::kBlockBegin) {
      Skip();
      ParseBlock(statement);
    } else {
      Fail("a tag is not expected here");
    }
    if (status_.ok()) body.push_back(std::move(statement));
  }

  void ParseBlock(Statement& s) {
    const std::string name = ExpectName();
    if (name == "if") return ParseIf(s);
    if (name == "for") return ParseFor(s);
    if (name == "set") return ParseSet(s);
    if (name == "macro") return ParseMacro(s);
    if (name == "break" || name == "continue") {
      if (loops_ == 0) Fail(absl::StrCat(name, " stands outside of a loop"));
      s.kind = name == "break" ? Statement::Kind::kBreak : Statement::Kind::kContinue;
      return ExpectBlockEnd();
    }
    if (name == "generation") {  // transformers marks what is trained on
      s.kind = Statement::Kind::kBlock;
      ExpectBlockEnd();
      s.body = ParseBody({"endgeneration"});
      return EndBlock();
    }
    Fail(absl::StrCat("the statement '", name.substr(0, 40),
                      "' is not known; known are if, for, set, macro, break, continue, raw, generation"));
  }

  void EndBlock() {  // {% endX %}, whose name was seen
    Skip();
    Skip();
    ExpectBlockEnd();
  }

  void ParseIf(Statement& s) {
    s.kind = Statement::Kind::kIf;
    while (status_.ok()) {
      Statement::Branch branch;
      branch.condition = ParseTuple(true);
      ExpectBlockEnd();
      branch.body = ParseBody({"elif", "else", "endif"});
      s.branches.push_back(std::move(branch));
      if (!status_.ok()) return;
      const std::string next = Next().text;
      if (next == "endif") return EndBlock();
      Skip();
      Skip();
      if (next == "elif") continue;
      ExpectBlockEnd();
      s.branches.push_back({nullptr, ParseBody({"endif"})});
      return EndBlock();
    }
  }

  void ParseFor(Statement& s) {
    s.kind = Statement::Kind::kFor;
    s.names = ParseNames();
    Expect(TakeName("in"), "in");
    s.expression = ParseTuple(false);
    if (TakeName("if")) s.condition = ParseExpression();
    if (IsName("recursive")) Fail("recursive loops are not known");
    ExpectBlockEnd();
    ++loops_;
    s.body = ParseBody({"else", "endfor"});
    --loops_;
    if (status_.ok() && Next().text == "else") {
      EndBlock();
      s.otherwise = ParseBody({"endfor"});
    }
    if (status_.ok()) EndBlock();
  }

  std::vector<std::string> ParseNames() {
    std::vector<std::string> names;
    const bool bracket = TakeOperator("(");
    do {
      names.push_back(ExpectName());
    } while (status_.ok() && TakeOperator(",") && Now().kind == Token::Kind::kName);
    if (bracket) Expect(TakeOperator(")"), ")");
    return names;
  }

  void ParseSet(Statement& s) {
    s.names = ParseNames();
    if (s.names.size() == 1 && TakeOperator(".")) s.attribute = ExpectName();
    if (TakeOperator("=")) {
      s.kind = Statement::Kind::kSet;
      s.expression = ParseTuple(true);
      return ExpectBlockEnd();
    }
    s.kind = Statement::Kind::kSetBlock;
    if (s.names.size() != 1 || !s.attribute.empty()) return Expect(false, "=");
    ExpectBlockEnd();
    s.body = ParseBody({"endset"});
    if (status_.ok()) EndBlock();
  }

  void ParseMacro(Statement& s) {
    s.kind = Statement::Kind::kMacro;
    s.names = {ExpectName()};
    Expect(TakeOperator("("), "(");
    while (status_.ok() && !IsOperator(")")) {
      std::string name = ExpectName();
      ExpressionPtr fallback = TakeOperator("=") ? ParseExpression() : nullptr;
      s.parameters.emplace_back(std::move(name), std::move(fallback));
      if (!TakeOperator(",")) break;
    }
    Expect(TakeOperator(")"), ")");
    ExpectBlockEnd();
    const int loops = std::exchange(loops_, 0);
    s.body = ParseBody({"endmacro"});
    loops_ = loops;
    if (status_.ok()) EndBlock();
  }

  // --- expressions, from what binds least to what binds most

  ExpressionPtr Make(Expression::Kind kind, int line, std::string name = "") {
    auto made = std::make_unique<Expression>();
    made->kind = kind;
    made->line = line;
    made->name = std::move(name);
    return made;
  }
  // Keeps trees shallow enough to be walked and freed by recursion, also those that loops build.
  ExpressionPtr Done(ExpressionPtr made) {
    for (const ExpressionPtr& child : made->children) made->depth = std::max(made->depth, child == nullptr ? 0 : child->depth + 1);
    for (const auto& [name, child] : made->named) made->depth = std::max(made->depth, child == nullptr ? 0 : child->depth + 1);
    if (made->depth > kMaxDepth) Fail(absl::StrCat("an expression is nested more than ", kMaxDepth, " deep"));
    return made;
  }
  ExpressionPtr Join(Expression::Kind kind, int line, ExpressionPtr left, ExpressionPtr right, std::string name = "") {
    ExpressionPtr made = Make(kind, line, std::move(name));
    made->children.push_back(std::move(left));
    made->children.push_back(std::move(right));
    return Done(std::move(made));
  }

  ExpressionPtr ParseTuple(bool with_if) {
    const int line = Now().line;
    ExpressionPtr first = with_if ? ParseExpression() : ParseOr();
    if (!IsOperator(",")) return first;
    ExpressionPtr tuple = Make(Expression::Kind::kList, line);
    tuple->children.push_back(std::move(first));
    while (TakeOperator(",")) {
      if (Now().kind == Token::Kind::kBlockEnd || Now().kind == Token::Kind::kOutputEnd || IsOperator(")")) break;
      tuple->children.push_back(with_if ? ParseExpression() : ParseOr());
    }
    return Done(std::move(tuple));
  }

  ExpressionPtr ParseExpression() {
    if (++nesting_ > kMaxDepth) Fail(absl::StrCat("expressions are nested more than ", kMaxDepth, " deep"));
    ExpressionPtr value = ParseOr();
    while (IsName("if")) {
      ExpressionPtr made = Make(Expression::Kind::kIf, Now().line);
      Skip();
      made->children.push_back(ParseOr());
      made->children.push_back(std::move(value));
      made->children.push_back(TakeName("else") ? ParseExpression() : nullptr);
      value = Done(std::move(made));
    }
    --nesting_;
    return value;
  }

  ExpressionPtr ParseOr() {
    ExpressionPtr left = ParseAnd();
    while (IsName("or")) {
      const int line = Now().line;
      Skip();
      left = Join(Expression::Kind::kOr, line, std::move(left), ParseAnd());
    }
    return left;
  }

  ExpressionPtr ParseAnd() {
    ExpressionPtr left = ParseNot();
    while (IsName("and")) {
      const int line = Now().line;
      Skip();
      left = Join(Expression::Kind::kAnd, line, std::move(left), ParseNot());
    }
    return left;
  }

  ExpressionPtr ParseNot() {
    if (!IsName("not")) return ParseCompare();
    ExpressionPtr made = Make(Expression::Kind::kNot, Now().line);
    Skip();
    if (++nesting_ > kMaxDepth) Fail(absl::StrCat("expressions are nested more than ", kMaxDepth, " deep"));
    made->children.push_back(ParseNot());
    --nesting_;
    return Done(std::move(made));
  }

  ExpressionPtr ParseCompare() {
    ExpressionPtr left = ParseSum();
    ExpressionPtr made;
    while (status_.ok()) {
      std::string op;
      for (const char* known : {"==", "!=", "<", "<=", ">", ">="}) {
        if (IsOperator(known)) op = known;
      }
      if (IsName("in")) op = "in";
      if (IsName("not") && Next().kind == Token::Kind::kName && Next().text == "in") op = "not in";
      if (op.empty()) break;
      if (made == nullptr) {
        made = Make(Expression::Kind::kCompare, Now().line);
        made->children.push_back(std::move(left));
      }
      Skip();
      if (op == "not in") Skip();
      made->operators.push_back(op);
      made->children.push_back(ParseSum());
    }
    return made == nullptr ? std::move(left) : Done(std::move(made));
  }

  template <typename Operand>
  ExpressionPtr ParseLeftToRight(std::initializer_list<const char*> operators, const Operand& operand) {
    ExpressionPtr left = operand();
    while (status_.ok()) {
      const char* found = nullptr;
      for (const char* op : operators) {
        if (IsOperator(op)) found = op;
      }
      if (found == nullptr) break;
      const int line = Now().line;
      Skip();
      left = Join(Expression::Kind::kArithmetic, line, std::move(left), operand(), found);
    }
    return left;
  }
  ExpressionPtr ParseSum() {
    return ParseLeftToRight({"+", "-"}, [this] { return ParseConcat(); });
  }
  ExpressionPtr ParseConcat() {
    return ParseLeftToRight({"~"}, [this] { return ParseProduct(); });
  }
  ExpressionPtr ParseProduct() {
    return ParseLeftToRight({"*", "/", "//", "%"}, [this] { return ParsePower(); });
  }
  ExpressionPtr ParsePower() {
    return ParseLeftToRight({"**"}, [this] { return ParseUnary(true); });
  }

  ExpressionPtr ParseUnary(bool with_filters) {
    ExpressionPtr value;
    if (IsOperator("-") || IsOperator("+")) {
      const bool negates = IsOperator("-");
      ExpressionPtr made = Make(Expression::Kind::kNegate, Now().line);
      Skip();
      if (++nesting_ > kMaxDepth) Fail(absl::StrCat("expressions are nested more than ", kMaxDepth, " deep"));
      made->children.push_back(ParseUnary(false));
      --nesting_;
      value = negates ? Done(std::move(made)) : std::move(made->children[0]);
    } else {
      value = ParsePostfix(ParsePrimary());
    }
    return with_filters ? ParseFilters(std::move(value)) : std::move(value);
  }

  ExpressionPtr ParsePrimary() {
    const Token token = Now();
    switch (token.kind) {
      case Token::Kind::kName: {
        Skip();
        ExpressionPtr made = Make(Expression::Kind::kLiteral, token.line);
        if (token.text == "true" || token.text == "True")
          made->value = Value::Bool(true);
        else if (token.text == "false" || token.text == "False")
          made->value = Value::Bool(false);
        else if (token.text == "none" || token.text == "None")
          made->value = Value::None();
        else
          made = Make(Expression::Kind::kName, token.line, token.text);
        return made;
      }
      case Token::Kind::kString: {
        std::string text;
        while (Now().kind == Token::Kind::kString) {
          text += Now().text;
          Skip();
        }
        ExpressionPtr made = Make(Expression::Kind::kLiteral, token.line);
        made->value = Value::Written(std::move(text));
        return made;
      }
      case Token::Kind::kInt:
      case Token::Kind::kFloat: {
        Skip();
        ExpressionPtr made = Make(Expression::Kind::kLiteral, token.line);
        made->value = token.kind == Token::Kind::kInt ? Value::Int(token.integer) : Value::Float(token.number);
        return made;
      }
      case Token::Kind::kOperator:
        if (TakeOperator("(")) {
          if (TakeOperator(")")) return Make(Expression::Kind::kList, token.line);
          ExpressionPtr inside = ParseTuple(true);
          Expect(TakeOperator(")"), ")");
          return inside;
        }
        if (TakeOperator("[")) {
          ExpressionPtr list = Make(Expression::Kind::kList, token.line);
          while (status_.ok() && !IsOperator("]")) {
            list->children.push_back(ParseExpression());
            if (!TakeOperator(",")) break;
          }
          Expect(TakeOperator("]"), "]");
          return Done(std::move(list));
        }
        if (TakeOperator("{")) {
          ExpressionPtr dict = Make(Expression::Kind::kDict, token.line);
          while (status_.ok() && !IsOperator("}")) {
            dict->children.push_back(ParseExpression());
            Expect(TakeOperator(":"), ":");
            dict->children.push_back(ParseExpression());
            if (!TakeOperator(",")) break;
          }
          Expect(TakeOperator("}"), "}");
          return Done(std::move(dict));
        }
        [[fallthrough]];
      default:
        Expect(false, "an expression");
        return Make(Expression::Kind::kLiteral, token.line);
    }
  }

  ExpressionPtr ParsePostfix(ExpressionPtr value) {
    while (status_.ok()) {
      const int line = Now().line;
      if (TakeOperator(".")) {
        if (Now().kind == Token::Kind::kInt) {
          ExpressionPtr index = Make(Expression::Kind::kLiteral, line);
          index->value = Value::Int(Now().integer);
          Skip();
          value = Join(Expression::Kind::kItem, line, std::move(value), std::move(index));
          continue;
        }
        ExpressionPtr made = Make(Expression::Kind::kAttribute, line, ExpectName());
        made->children.push_back(std::move(value));
        value = Done(std::move(made));
      } else if (TakeOperator("[")) {
        value = ParseSubscript(std::move(value), line);
      } else if (IsOperator("(")) {
        ExpressionPtr made = Make(Expression::Kind::kCall, line);
        made->children.push_back(std::move(value));
        ParseArguments(*made);
        value = Done(std::move(made));
      } else {
        break;
      }
    }
    return value;
  }

  ExpressionPtr ParseSubscript(ExpressionPtr value, int line) {
    ExpressionPtr parts[3];
    int colons = 0;
    while (status_.ok() && !IsOperator("]")) {
      if (TakeOperator(":")) {
        if (++colons > 2) Fail("a slice has more than three parts");
      } else {
        parts[std::min(colons, 2)] = ParseExpression();
        if (!IsOperator(":") && !IsOperator("]")) Expect(false, "]");
      }
    }
    Expect(TakeOperator("]"), "]");
    if (colons == 0) {
      if (parts[0] == nullptr) Fail("a subscript is empty");
      return Join(Expression::Kind::kItem, line, std::move(value), std::move(parts[0]));
    }
    ExpressionPtr made = Make(Expression::Kind::kSlice, line);
    made->children.push_back(std::move(value));
    for (ExpressionPtr& part : parts) made->children.push_back(std::move(part));
    return Done(std::move(made));
  }

  void ParseArguments(Expression& call) {
    Expect(TakeOperator("("), "(");
    while (status_.ok() && !IsOperator(")")) {
      if (Now().kind == Token::Kind::kName && Next().kind == Token::Kind::kOperator && Next().text == "=") {
        std::string name = ExpectName();
        Skip();
        call.named.emplace_back(std::move(name), ParseExpression());
      } else {
        call.children.push_back(ParseExpression());
      }
      if (!TakeOperator(",")) break;
    }
    Expect(TakeOperator(")"), ")");
  }

  ExpressionPtr ParseFilters(ExpressionPtr value) {
    while (status_.ok()) {
      const int line = Now().line;
      if (TakeOperator("|")) {
        ExpressionPtr made = Make(Expression::Kind::kFilter, line, ExpectName());
        made->children.push_back(std::move(value));
        if (IsOperator("(")) ParseArguments(*made);
        value = Done(std::move(made));
      } else if (IsName("is")) {
        Skip();
        const bool negated = TakeName("not");
        ExpressionPtr made = Make(Expression::Kind::kTest, line, ExpectName());
        made->children.push_back(std::move(value));
        const Token::Kind kind = Now().kind;
        const bool operand = kind == Token::Kind::kString || kind == Token::Kind::kInt || kind == Token::Kind::kFloat ||
                             IsOperator("[") || IsOperator("{") ||
                             (kind == Token::Kind::kName && !IsName("else") && !IsName("or") && !IsName("and") && !IsName("if") &&
                              !IsName("is") && !IsName("in") && !IsName("not"));
        if (IsOperator("("))
          ParseArguments(*made);
        else if (operand)
          made->children.push_back(ParsePostfix(ParsePrimary()));
        value = Done(std::move(made));
        if (negated) {
          ExpressionPtr inverse = Make(Expression::Kind::kNot, line);
          inverse->children.push_back(std::move(value));
          value = Done(std::move(inverse));
        }
      } else if (IsOperator("(")) {
        value = ParsePostfix(std::move(value));
      } else {
        break;
      }
    }
    return value;
  }

  const std::vector<Token> tokens_;
  size_t at_ = 0;
  int nesting_ = 0;
  int loops_ = 0;
  absl::Status status_;
};

}  // namespace

absl::StatusOr<Body> Parse(const std::string& source) {
  if (source.size() > kMaxSourceBytes) {
    return absl::InvalidArgumentError(absl::StrCat("has ", source.size(), " bytes; at most ", kMaxSourceBytes, " are accepted"));
  }
  if (FindBrokenUtf8(source) != std::string::npos) return absl::InvalidArgumentError("is not UTF-8");
  std::string lines;
  for (size_t i = 0; i < source.size(); ++i) {
    if (source[i] != '\r')
      lines += source[i];
    else if (i + 1 >= source.size() || source[i + 1] != '\n')
      lines += '\n';
  }
  if (lines.ends_with('\n')) lines.pop_back();
  absl::StatusOr<std::vector<Token>> tokens = Lexer(std::move(lines)).Run();
  if (!tokens.ok()) return tokens.status();
  return Parser(*std::move(tokens)).Run();
}

}  // namespace memserve::engine::jinja
