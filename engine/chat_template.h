// A checkpoint's chat template: messages → the text that the model was trained to see.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/jinja/interpreter.h"
#include "engine/request.h"
#include "engine/tokenizer/tokenizer.h"

namespace memserve::engine {

struct RenderedChat {
  std::string text;
  std::vector<TextSpan> from_messages;  // what the messages wrote: special tokens' names in there are text
};

class ChatTemplate {
 public:
  // chat_template.jinja, else what tokenizer_config.json has ("chat_template": a text, or a list of which the one named "default"
  // is taken). NOT_FOUND where there is neither; INVALID_ARGUMENT names file and line.
  static absl::StatusOr<std::unique_ptr<ChatTemplate>> Load(const std::string& folder, const Tokenizer& tokenizer);

  // The template's own text, as `where` calls it in messages; `variables` are what it may use beside the messages.
  static absl::StatusOr<std::unique_ptr<ChatTemplate>> Parse(const std::string& source, const std::string& where,
                                                             jinja::Dict variables);

  // INVALID_ARGUMENT where the template refuses the messages or takes too long.
  absl::StatusOr<RenderedChat> Render(const Chat& chat) const;

 private:
  ChatTemplate() = default;
  jinja::Body body_;
  jinja::Dict variables_;
};

}  // namespace memserve::engine
