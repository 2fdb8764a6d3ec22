#include "clients/flags.h"

#include <algorithm>
#include <charconv>
#include <utility>

namespace memserve::clients {
namespace {

template <typename Number>
Flags::Parse IntoNumber(std::optional<Number>& value) {
  return [&value](const std::string& text) {
    Number number{};
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    value = number;
    return error == std::errc() && end == text.data() + text.size();
  };
}

template <typename Number>
Flags::Parse IntoNumbers(std::vector<Number>& values) {
  return [&values](const std::string& text) {
    values.clear();
    const char* at = text.data();
    const char* const end = at + text.size();
    while (true) {
      Number value{};
      const auto [after, error] = std::from_chars(at, end, value);
      if (error != std::errc()) return false;
      values.push_back(value);
      if (after == end) return true;
      if (*after != ',') return false;
      at = after + 1;
    }
  };
}

std::optional<bool> ReadSwitch(const std::string& text) {
  if (text == "on" || text == "true") return true;
  if (text == "off" || text == "false") return false;
  return std::nullopt;
}

}  // namespace

void Flags::Add(const std::string& name, const std::string& group, const std::string& limit, Parse parse) {
  flags_.push_back({name, group, limit, std::move(parse)});
}

void Flags::AddSwitch(const std::string& name, const std::string& group, bool& on) {
  flags_.push_back({name, group, "on or off",
                    [&on](const std::string& text) {
                      const std::optional<bool> value = ReadSwitch(text);
                      on = value.value_or(on);
                      return value.has_value();
                    },
                    true});
}

const Flags::Flag* Flags::Find(const std::string& name) const {
  const auto found = std::find_if(flags_.begin(), flags_.end(), [&](const Flag& flag) { return flag.name == name; });
  return found == flags_.end() ? nullptr : &*found;
}

std::optional<std::string> Flags::Read(int argc, const char* const* argv, const GroupsOf& groups_of,
                                       std::vector<std::string>& words) const {
  std::vector<const Flag*> used;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--") {
      words.insert(words.end(), argv + i + 1, argv + argc);
      break;
    }
    if (word.rfind("--", 0) != 0) {
      words.push_back(word);
      continue;
    }
    const size_t equals = word.find('=');
    const std::string name = word.substr(2, equals == std::string::npos ? equals : equals - 2);
    const Flag* flag = Find(name);
    if (flag == nullptr) return "there is no flag --" + name;
    std::string value = "on";
    if (equals != std::string::npos) {
      value = word.substr(equals + 1);
    } else if (!flag->is_switch) {
      if (++i == argc) return "--" + name + " needs a value";
      value = argv[i];
    }
    if (!flag->parse(value)) return "--" + name + " is \"" + value + "\"; it must be " + flag->limit;
    used.push_back(flag);
  }
  if (words.empty()) return std::nullopt;
  const std::vector<std::string> groups = groups_of(words.front());
  for (const Flag* flag : used) {
    if (!groups.empty() && std::find(groups.begin(), groups.end(), flag->group) == groups.end()) {
      return "--" + flag->name + " means nothing to " + words.front();
    }
  }
  return std::nullopt;
}

Flags::Parse Into(std::string& value) {
  return [&value](const std::string& text) {
    value = text;
    return true;
  };
}

Flags::Parse Into(std::vector<std::string>& values) {
  return [&values](const std::string& text) {
    values.push_back(text);
    return true;
  };
}

Flags::Parse Into(std::vector<int32_t>& values) { return IntoNumbers(values); }
Flags::Parse Into(std::vector<double>& values) { return IntoNumbers(values); }

Flags::Parse Into(std::optional<bool>& value) {
  return [&value](const std::string& text) {
    value = ReadSwitch(text);
    return value.has_value();
  };
}

Flags::Parse Into(std::optional<float>& value) { return IntoNumber(value); }
Flags::Parse Into(std::optional<double>& value) { return IntoNumber(value); }
Flags::Parse Into(std::optional<int32_t>& value) { return IntoNumber(value); }
Flags::Parse Into(std::optional<uint64_t>& value) { return IntoNumber(value); }

}  // namespace memserve::clients
