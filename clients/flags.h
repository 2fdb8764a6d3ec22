// Reads a command line such as `complete --max_tokens=5 --stop=A --stop=B PROMPT`: flags may stand anywhere, repeat and be written
// with = or a blank; after -- all is taken as it is.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace memserve::clients {

class Flags {
 public:
  // Takes a flag's value from text. False: it is none.
  using Parse = std::function<bool(const std::string& text)>;

  void Add(const std::string& name, const std::string& group, const std::string& limit, Parse parse);
  // May stand without a value.
  void AddSwitch(const std::string& name, const std::string& group, bool& on);

  // What is no flag goes to `words`, the first of which is the command: `groups_of` says which groups of flags it takes. Returns
  // what is wrong, or nothing.
  using GroupsOf = std::function<std::vector<std::string>(const std::string& command)>;
  std::optional<std::string> Read(int argc, const char* const* argv, const GroupsOf& groups_of,
                                  std::vector<std::string>& words) const;

 private:
  struct Flag {
    std::string name;
    std::string group;
    std::string limit;  // what the value must be
    Parse parse;
    bool is_switch = false;
  };

  const Flag* Find(const std::string& name) const;

  std::vector<Flag> flags_;
};

// The whole text must be the value; a text given twice replaces the first, in a list it adds one.
Flags::Parse Into(std::string& value);
Flags::Parse Into(std::vector<std::string>& values);
Flags::Parse Into(std::vector<int32_t>& values);  // with commas between them; replaces
Flags::Parse Into(std::vector<double>& values);   // likewise
Flags::Parse Into(std::optional<bool>& value);  // on or off
Flags::Parse Into(std::optional<float>& value);
Flags::Parse Into(std::optional<double>& value);
Flags::Parse Into(std::optional<int32_t>& value);
Flags::Parse Into(std::optional<uint64_t>& value);

}  // namespace memserve::clients
