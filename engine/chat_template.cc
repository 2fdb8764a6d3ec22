#include "engine/chat_template.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "engine/model/json.h"
#include "engine/model/load_macros.h"

namespace memserve::engine {
namespace {

constexpr int64_t kMaxTemplateBytes = 1 << 20;
constexpr int64_t kMaxConfigBytes = 8 << 20;

// Roles that templates are written for. They may be part of a special token's name ('<|' + role + '|>'); any other role is as
// untrusted as a message's text.
bool IsKnownRole(const std::string& role) {
  for (const char* known : {"system", "developer", "user", "assistant", "tool"}) {
    if (role == known) return true;
  }
  return false;
}

std::string TokenText(const nlohmann::json& token) {
  if (token.is_string()) return token.get<std::string>();
  if (token.is_object() && token.contains("content") && token["content"].is_string()) return token["content"].get<std::string>();
  return "";
}

absl::StatusOr<std::string> SourceIn(const nlohmann::json& config, const std::string& where) {
  const auto it = config.find("chat_template");
  if (it == config.end() || it->is_null()) return absl::NotFoundError(absl::StrCat(where, ": has no chat_template"));
  if (it->is_string()) return it->get<std::string>();
  if (it->is_array()) {
    for (const bool any : {false, true}) {
      for (const nlohmann::json& entry : *it) {
        if (!entry.is_object() || !entry.contains("name") || !entry.contains("template") || !entry["template"].is_string())
          continue;
        if (entry["name"] == "default" || (any && it->size() == 1)) return entry["template"].get<std::string>();
      }
    }
  }
  return absl::InvalidArgumentError(absl::StrCat(where, ": chat_template is neither a text nor a list with one named 'default'"));
}

}  // namespace

absl::StatusOr<std::unique_ptr<ChatTemplate>> ChatTemplate::Load(const std::string& folder, const Tokenizer& tokenizer) {
  const std::string config_path = absl::StrCat(folder, "/tokenizer_config.json");
  nlohmann::json config = nlohmann::json::object();
  if (absl::StatusOr<std::string> text = ReadFile(config_path, kMaxConfigBytes); text.ok()) {
    LOAD_OR_RETURN(config, ParseJsonObject(*text, config_path));
  } else if (!absl::IsNotFound(text.status())) {
    return text.status();
  }
  std::string where = absl::StrCat(folder, "/chat_template.jinja");
  absl::StatusOr<std::string> source = ReadFile(where, kMaxTemplateBytes);
  if (absl::IsNotFound(source.status())) {
    where = absl::StrCat(config_path, ": chat_template");
    source = SourceIn(config, config_path);
  }
  if (!source.ok()) return source.status();

  jinja::Dict variables;
  for (const char* name : {"bos_token", "eos_token", "unk_token", "pad_token"}) {
    std::string token = config.contains(name) ? TokenText(config[name]) : "";
    if (token.empty() && name == std::string_view("bos_token") && tokenizer.bos_id())
      token = tokenizer.SpecialName(*tokenizer.bos_id());
    if (token.empty() && name == std::string_view("eos_token") && tokenizer.eos_id())
      token = tokenizer.SpecialName(*tokenizer.eos_id());
    if (!token.empty()) variables.emplace_back(name, jinja::Value::Written(std::move(token)));
  }
  return Parse(*source, where, std::move(variables));
}

absl::StatusOr<std::unique_ptr<ChatTemplate>> ChatTemplate::Parse(const std::string& source, const std::string& where,
                                                                  jinja::Dict variables) {
  std::unique_ptr<ChatTemplate> made(new ChatTemplate);
  absl::StatusOr<jinja::Body> body = jinja::Parse(source);
  if (!body.ok()) return absl::InvalidArgumentError(absl::StrCat(where, ": ", body.status().message()));
  made->body_ = *std::move(body);
  made->variables_ = std::move(variables);
  made->variables_.emplace_back("tools", jinja::Value::None());
  made->variables_.emplace_back("documents", jinja::Value::None());
  return made;
}

absl::StatusOr<RenderedChat> ChatTemplate::Render(const Chat& chat) const {
  jinja::List messages;
  for (const ChatMessage& message : chat.messages) {
    messages.push_back(
        jinja::Value::Of(jinja::Dict{{"role", jinja::Value::Of(jinja::Text(message.role, !IsKnownRole(message.role)))},
                                     {"content", jinja::Value::Of(jinja::Text(message.content, true))}}));
  }
  jinja::Dict variables = variables_;
  variables.emplace_back("messages", jinja::Value::Of(std::move(messages)));
  variables.emplace_back("add_generation_prompt", jinja::Value::Bool(chat.add_generation_prompt));
  absl::StatusOr<jinja::Text> rendered = jinja::Run(body_, variables, {});
  if (!rendered.ok()) return absl::InvalidArgumentError(absl::StrCat("chat: the template, ", rendered.status().message()));
  RenderedChat result = {.text = rendered->bytes()};
  const std::string& marks = rendered->marks();
  for (size_t begin = marks.find('\1'); begin != std::string::npos;) {
    const size_t end = std::min(marks.find('\0', begin), marks.size());
    result.from_messages.push_back({begin, end});
    begin = marks.find('\1', end);
  }
  return result;
}

}  // namespace memserve::engine
