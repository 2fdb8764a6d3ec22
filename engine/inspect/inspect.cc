#include "engine/inspect/inspect.h"

#include <openssl/evp.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/checkpoint_folder.h"
#include "engine/model/load_macros.h"
#include "engine/start_plan.h"

namespace memserve::engine {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kReadBytes = 4 << 20;
constexpr int64_t kMaxSumsBytes = 1 << 20;

absl::StatusOr<std::string> Sha256Of(const std::string& path) {
  const std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context(EVP_MD_CTX_new(), EVP_MD_CTX_free);
  EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr);
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::PermissionDeniedError(absl::StrCat(path, ": cannot be read"));
  std::vector<char> buffer(kReadBytes);
  while (file) {
    file.read(buffer.data(), kReadBytes);
    EVP_DigestUpdate(context.get(), buffer.data(), file.gcount());
  }
  if (!file.eof()) return absl::DataLossError(absl::StrCat(path, ": a read failed"));
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest;
  unsigned int length = 0;
  EVP_DigestFinal_ex(context.get(), digest.data(), &length);
  std::string hex;
  for (unsigned int i = 0; i < length; ++i) absl::StrAppendFormat(&hex, "%02x", digest[i]);
  return hex;
}

// What the folder's SHA256SUMS says, by file name.
std::map<std::string, std::string> ListedSums(const std::string& folder) {
  std::map<std::string, std::string> sums;
  const std::string path = folder + "/SHA256SUMS";
  std::error_code error;
  if (std::filesystem::file_size(path, error) > kMaxSumsBytes || error) return sums;
  std::ifstream file(path);
  for (std::string sum, name; file >> sum >> name;) sums[name.starts_with("*") ? name.substr(1) : name] = sum;
  return sums;
}

absl::StatusOr<Json> Files(const std::string& folder, bool checksums) {
  const std::map<std::string, std::string> listed = checksums ? ListedSums(folder) : std::map<std::string, std::string>();
  std::vector<std::string> names;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    if (entry.is_regular_file(error)) names.push_back(entry.path().filename());
  }
  std::sort(names.begin(), names.end());
  Json files = Json::array();
  for (const std::string& name : names) {
    const std::string path = absl::StrCat(folder, "/", name);
    Json file = {{"name", name}, {"bytes", static_cast<int64_t>(std::filesystem::file_size(path, error))}};
    if (checksums) {
      LOAD_OR_RETURN(const std::string sum, Sha256Of(path));
      file["sha256"] = sum;
      if (const auto found = listed.find(name); found != listed.end()) file["as_listed"] = found->second == sum;
    }
    files.push_back(std::move(file));
  }
  return files;
}

// In the order in which they are shown. A tensor belongs to the first whose words its name has, by either naming.
constexpr std::pair<const char*, std::array<const char*, 4>> kKinds[] = {
    {"value tables", {"feed_forward.values"}},
    {"memory queries and keys", {"feed_forward.keys", "query_proj", "query_norm", "log_score_scale"}},
    {"memory projections and gates", {"value_proj", "swilu_projection", "gating"}},
    {"norms", {"norm"}},
    {"attention", {"attention.", "self_attn."}},
    {"feed-forward", {"feed_forward.", "mlp."}},
    {"embedding and output", {"embed", "output.", "lm_head."}},
    {"other", {""}},
};

size_t KindOf(const std::string& name) {
  const auto matches = [&](const char* words) { return words != nullptr && absl::StrContains(name, words); };
  size_t kind = 0;
  while (std::none_of(kKinds[kind].second.begin(), kKinds[kind].second.end(), matches)) ++kind;
  return kind;
}

Json Tensors(const Checkpoint& checkpoint) {
  struct Group {
    int64_t tensors = 0, parameters = 0, bytes = 0;
    std::map<std::string, int64_t> types;
  };
  std::array<Group, std::size(kKinds)> groups;
  for (const auto& [name, tensor] : checkpoint.tensors()) {
    Group& group = groups[KindOf(name)];
    int64_t parameters = tensor.dtype == kernels::DType::kU8 ? 2 : 1;
    for (int64_t extent : tensor.shape) parameters *= extent;
    ++group.tensors;
    group.parameters += parameters;
    group.bytes += tensor.bytes;
    ++group.types[tensor.dtype == kernels::DType::kU8 ? "int4" : kernels::NameOf(tensor.dtype)];
  }
  Json out = Json::array();
  for (size_t kind = 0; kind < groups.size(); ++kind) {
    const Group& group = groups[kind];
    if (group.tensors == 0) continue;
    out.push_back({{"kind", kKinds[kind].first},
                   {"tensors", group.tensors},
                   {"types", group.types},
                   {"parameters", group.parameters},
                   {"bytes", group.bytes}});
  }
  return out;
}

std::string FormOf(const MemoryConfig& memory) {
  std::string form = memory.peer_variant ? "PEER" : memory.swilu_projection ? "Memory+" : "plain";
  if (memory.mem_gated) form += ", gated";
  return form;
}

Json MemoryLayers(const ModelConfig& model) {
  Json layers = Json::array();
  const MemoryConfig& memory = model.memory;
  for (int layer : memory.layers) {
    layers.push_back({{"layer", layer},
                      {"table_of_layer", memory.mem_share_values ? memory.layers.front() : layer},
                      {"form", FormOf(memory)},
                      {"rows", memory.rows()},
                      {"dim", model.value_dim()},
                      {"mem_heads", memory.mem_heads},
                      {"mem_knn", memory.mem_knn},
                      {"mem_n_keys", memory.mem_n_keys},
                      {"mem_k_dim", memory.mem_k_dim}});
  }
  return layers;
}

Json PlanOf(const StartPlan& plan) {
  const RankOptions& rank = plan.executor.rank;
  return {{"weight_dtype", kernels::NameOf(rank.types.weight)},
          {"table_dtype", kernels::NameOf(rank.types.table)},
          {"kv_dtype", kernels::NameOf(rank.kv_dtype)},
          {"weight_bytes", plan.Sum(&RankPlan::weight_bytes)},
          {"table_bytes", plan.Sum(&RankPlan::table_bytes)},
          {"kv_bytes", plan.Sum(&RankPlan::kv_bytes)},
          {"kv_tokens", rank.kv_pages * rank.kv_page_size},
          {"scratch_bytes", plan.Sum(&RankPlan::scratch_bytes)},
          {"total_bytes", plan.total()},
          {"largest_device_bytes", std::max_element(plan.ranks.begin(), plan.ranks.end(), [](const RankPlan& a, const RankPlan& b) {
                                     return a.total() < b.total();
                                   })->total()}};
}

// How it would be held: as the options say, and with every format of the value tables. What does not fit says what would.
absl::StatusOr<Json> Holdings(const EngineOptions& options, const CheckpointFolder& folder) {
  Json held = {{"devices", options.devices.size()},
               {"available_bytes", options.memory_limit_bytes > 0 ? options.memory_limit_bytes : AvailableMemory()}};
  std::vector<std::string> formats = {options.table_dtype};
  if (options.table_dtype == "auto" && !folder.model.memory.layers.empty()) formats = {"auto", "f32", "bf16", "int8", "int4"};
  for (const std::string& format : formats) {
    EngineOptions with = options;
    with.table_dtype = format;
    absl::StatusOr<StartPlan> plan = MakeStartPlan(with, folder.model, *folder.tensors);
    if (!plan.ok() && !absl::IsResourceExhausted(plan.status())) return plan.status();
    Json entry = plan.ok() ? PlanOf(*plan) : Json{{"does_not_fit", std::string(plan.status().message())}};
    entry["fits"] = plan.ok();
    held[format == formats.front() ? "plan" : format] = std::move(entry);
  }
  return held;
}

// ---------------------------------------------------------------- for people

std::string Grouped(int64_t number) {
  std::string digits = std::to_string(number);
  for (int64_t at = static_cast<int64_t>(digits.size()) - 3; at > 0; at -= 3) digits.insert(at, ",");
  return digits;
}

// Columns as wide as their widest cell; the first row is the heading.
std::string Table(const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> widths;
  for (const auto& row : rows) {
    widths.resize(std::max(widths.size(), row.size()));
    for (size_t c = 0; c < row.size(); ++c) widths[c] = std::max(widths[c], row[c].size());
  }
  std::string out;
  for (const auto& row : rows) {
    std::string line = " ";
    for (size_t c = 0; c < row.size(); ++c) absl::StrAppend(&line, " ", row[c], std::string(widths[c] - row[c].size() + 1, ' '));
    absl::StrAppend(&out, line.substr(0, line.find_last_not_of(' ') + 1), "\n");
  }
  return out;
}

std::string TypesOf(const Json& types) {
  std::string out;
  for (const auto& [type, count] : types.items()) absl::StrAppend(&out, out.empty() ? "" : ", ", type);
  return out;
}

std::string Text(const Json& value) { return value.get<std::string>(); }
int64_t Int(const Json& value) { return value.get<int64_t>(); }

}  // namespace

absl::StatusOr<Json> Inspect(const EngineOptions& options, bool checksums) {
  LOAD_OR_RETURN(const CheckpointFolder folder, ReadCheckpointFolder(options.checkpoint));
  const ModelConfig& model = folder.model;
  Json out = {{"checkpoint", options.checkpoint},
              {"model",
               {{"n_layers", model.n_layers},
                {"dim", model.dim},
                {"n_heads", model.n_heads},
                {"n_kv_heads", model.n_kv_heads},
                {"head_dim", model.head_dim},
                {"ffn_dim", model.ffn_dim},
                {"vocab_size", model.vocab_size},
                {"max_seqlen", model.max_seqlen}}}};
  if (folder.tokenizer == nullptr) {
    out["tokenizer"] = nullptr;
  } else {
    Json& tokenizer = out["tokenizer"] = {{"kind", folder.tokenizer->name()}, {"vocab_size", folder.tokenizer->vocab_size()}};
    if (folder.tokenizer->bos_id()) tokenizer["bos_id"] = *folder.tokenizer->bos_id();
    if (folder.tokenizer->eos_id()) tokenizer["eos_id"] = *folder.tokenizer->eos_id();
  }
  out["tensors"] = Tensors(*folder.tensors);
  out["memory_layers"] = MemoryLayers(model);
  LOAD_OR_RETURN(out["held"], Holdings(options, folder));
  LOAD_OR_RETURN(out["files"], Files(options.checkpoint, checksums));
  return out;
}

std::string FormatInspection(const Json& inspection) {
  const Json& model = inspection.at("model");
  std::string out = absl::StrCat(Text(inspection.at("checkpoint")), "\n");
  absl::StrAppend(&out, "  model      ", Int(model.at("n_layers")), " layers, dim ", Grouped(Int(model.at("dim"))), ", ",
                  Int(model.at("n_heads")), " heads (", Int(model.at("n_kv_heads")), " KV) of ", Int(model.at("head_dim")),
                  ", feed-forward ", Grouped(Int(model.at("ffn_dim"))), ", vocabulary ", Grouped(Int(model.at("vocab_size"))),
                  ", context ", Grouped(Int(model.at("max_seqlen"))), "\n");
  const Json& tokenizer = inspection.at("tokenizer");
  absl::StrAppend(&out, "  tokenizer  ",
                  tokenizer.is_null() ? "none: token ids only"
                                      : absl::StrCat(Text(tokenizer.at("kind")), ", ", Grouped(Int(tokenizer.at("vocab_size"))), " tokens"),
                  "\n");

  std::vector<std::vector<std::string>> rows = {{"TENSORS", "number", "type", "parameters", "size"}};
  int64_t tensors = 0, parameters = 0, bytes = 0;
  for (const Json& group : inspection.at("tensors")) {
    rows.push_back({Text(group.at("kind")), Grouped(Int(group.at("tensors"))), TypesOf(group.at("types")),
                    Grouped(Int(group.at("parameters"))), FormatBytes(Int(group.at("bytes")))});
    tensors += Int(group.at("tensors")), parameters += Int(group.at("parameters")), bytes += Int(group.at("bytes"));
  }
  rows.push_back({"all", Grouped(tensors), "", Grouped(parameters), FormatBytes(bytes)});
  absl::StrAppend(&out, "\n", Table(rows));

  if (!inspection.at("memory_layers").empty()) {
    rows = {{"MEMORY LAYER", "form", "table", "rows", "dim", "heads", "knn", "half keys"}};
    for (const Json& layer : inspection.at("memory_layers")) {
      rows.push_back({absl::StrCat(Int(layer.at("layer"))), Text(layer.at("form")), absl::StrCat("of layer ", Int(layer.at("table_of_layer"))),
                      Grouped(Int(layer.at("rows"))), Grouped(Int(layer.at("dim"))), absl::StrCat(Int(layer.at("mem_heads"))),
                      absl::StrCat(Int(layer.at("mem_knn"))),
                      absl::StrCat("2 x ", Grouped(Int(layer.at("mem_n_keys"))), " x ", Int(layer.at("mem_k_dim")) / 2)});
    }
    absl::StrAppend(&out, "\n", Table(rows));
  }

  const Json& held = inspection.at("held");
  rows = {{absl::StrCat("HELD, ", FormatBytes(Int(held.at("available_bytes"))), " available, ", Int(held.at("devices")),
                        Int(held.at("devices")) == 1 ? " device" : " devices"),
           "weights", "value tables", "KV cache", "scratch", "all", "largest device"}};
  for (const auto& [name, plan] : held.items()) {
    if (!plan.is_object()) continue;
    const std::string title = name == "plan" ? "as started" : absl::StrCat("--table_dtype=", name);
    if (!plan.at("fits").get<bool>()) {
      rows.push_back({title, absl::StrCat("does not fit: ", Text(plan.at("does_not_fit")))});
      continue;
    }
    rows.push_back({title, absl::StrCat(FormatBytes(Int(plan.at("weight_bytes"))), " ", Text(plan.at("weight_dtype"))),
                    Int(plan.at("table_bytes")) == 0 ? "none" : absl::StrCat(FormatBytes(Int(plan.at("table_bytes"))), " ", Text(plan.at("table_dtype"))),
                    absl::StrCat(FormatBytes(Int(plan.at("kv_bytes"))), " (", Grouped(Int(plan.at("kv_tokens"))), " tokens)"),
                    FormatBytes(Int(plan.at("scratch_bytes"))), FormatBytes(Int(plan.at("total_bytes"))),
                    FormatBytes(Int(plan.at("largest_device_bytes")))});
  }
  // A message is no column.
  std::vector<std::string> notes;
  for (auto& row : rows) {
    if (row.size() == 2) {
      notes.push_back(absl::StrCat("  ", row[0], ": ", row[1], "\n"));
      row.clear();
    }
  }
  rows.erase(std::remove_if(rows.begin(), rows.end(), [](const auto& row) { return row.empty(); }), rows.end());
  absl::StrAppend(&out, "\n", Table(rows));
  for (const std::string& note : notes) absl::StrAppend(&out, note);

  rows = {{"FILE", "size"}};
  for (const Json& file : inspection.at("files")) {
    rows.push_back({Text(file.at("name")), FormatBytes(Int(file.at("bytes")))});
    if (!file.contains("sha256")) continue;
    rows.back().push_back(Text(file.at("sha256")));
    if (file.contains("as_listed")) rows.back().push_back(file.at("as_listed").get<bool>() ? "as listed" : "NOT AS LISTED in SHA256SUMS");
  }
  if (rows.size() > 1 && rows[1].size() > 2) rows[0].insert(rows[0].end(), {"sha256"});
  absl::StrAppend(&out, "\n", Table(rows));
  return out;
}

}  // namespace memserve::engine
