// Command line → proto, and proto → JSON.
#pragma once

#include <optional>
#include <string>

#include "clients/options.h"
#include "memserve/v1/inference.pb.h"
#include "nlohmann/json.hpp"

namespace memserve::clients {

// `-` is standard input; with --token_ids the text is ids, apart by blanks or commas. False: it is not.
bool ReadPrompt(const Options& options, const std::string& word, std::optional<std::string>& text, v1::TokenIds& ids);
bool ParseIds(const std::string& text, v1::TokenIds& ids);

// All of the request but its prompt.
v1::GenerateRequest ToGenerateRequest(const Options& options);
v1::SchedulingParams ToScheduling(const Options& options);
v1::MemoryParams ToMemory(const Options& options);

// A line for each row that fired: position, token id, layer, memory head, row, weight.
void PrintTrace(const v1::TokenTrace& trace);

// Field names as in the proto; optional fields only if set; bytes in base64.
nlohmann::ordered_json ToJson(const google::protobuf::Message& message);
void PrintJson(const nlohmann::ordered_json& json);  // one line

}  // namespace memserve::clients
