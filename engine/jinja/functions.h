// Filters, tests, methods and functions of templates.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "engine/jinja/interpreter.h"
#include "engine/jinja/value.h"

namespace memserve::engine::jinja {

// What a run has used, and the first thing that went wrong.
class Meter {
 public:
  explicit Meter(const Limits& limits) : limits_(limits), steps_(limits.steps), bytes_(limits.text_bytes) {}

  bool ok() const { return status_.ok(); }
  const absl::Status& status() const { return status_; }
  const Limits& limits() const { return limits_; }
  void set_line(int line) { line_ = line; }
  void Fail(absl::string_view what);
  // False, and the run is over, where there are not so many left.
  bool Steps(int64_t count);
  bool Bytes(int64_t count);
  // Of a new list or dict: neither too deep nor with a namespace inside.
  Value Checked(Value value);

 private:
  const Limits limits_;
  int64_t steps_;
  int64_t bytes_;
  int line_ = 0;
  absl::Status status_;
};

struct Arguments {
  std::vector<Value> values;
  std::vector<std::pair<std::string, Value>> named;

  // The argument at a place or of a name; null: not given.
  const Value* Get(size_t place, std::string_view name) const;
  int64_t Int(size_t place, std::string_view name, int64_t fallback, Meter& meter) const;
};

bool IsFilter(std::string_view name);
bool IsTest(std::string_view name);
Value ApplyFilter(const std::string& name, const Value& input, const Arguments& arguments, Meter& meter);
bool ApplyTest(const std::string& name, const Value& input, const Arguments& arguments, Meter& meter);
Value CallMethod(const Value& object, const std::string& name, const Arguments& arguments, Meter& meter);
Value CallFunction(const std::string& name, const Arguments& arguments, Meter& meter);

// Python's str(), counted before it is made.
Text TextOf(const Value& value, Meter& meter);
Value Add(const Value& left, const Value& right, Meter& meter);
bool Contains(const Value& container, const Value& item, Meter& meter);
// -1, 0 or 1.
int Compare(const Value& left, const Value& right, Meter& meter);
// Python's [index] and [begin:end:step] of a text (by characters) or list; null: left out.
Value Item(const Value& object, int64_t index, Meter& meter);
Value Slice(const Value& object, const int64_t* begin, const int64_t* end, const int64_t* step, Meter& meter);

}  // namespace memserve::engine::jinja
