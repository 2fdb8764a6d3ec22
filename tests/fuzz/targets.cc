#include "tests/fuzz/targets.h"

#include "engine/model/config.h"
#include "engine/model/safetensors.h"
#include "kernels/check.h"

namespace memserve::fuzz {
namespace {

// Every refusal is one line.
void CheckOneLine(const absl::Status& status) {
  if (!status.ok()) MEMSERVE_CHECK(!status.message().empty() && status.message().find('\n') == absl::string_view::npos);
}

}  // namespace

void SafetensorsHeader(const std::string& bytes) {
  constexpr int64_t kDataBytes = 4096;
  const auto tensors = engine::ParseSafetensorsHeader(bytes, "file", kDataBytes);
  CheckOneLine(tensors.status());
  if (!tensors.ok()) return;
  int64_t covered = 0;
  for (const engine::TensorInfo& tensor : *tensors) {
    MEMSERVE_CHECK(tensor.offset >= 0 && tensor.bytes >= 0 && tensor.offset + tensor.bytes <= kDataBytes);
    covered += tensor.bytes;
  }
  MEMSERVE_CHECK_EQ(covered, kDataBytes);
}

void SafetensorsIndex(const std::string& bytes) {
  const auto files = engine::ParseSafetensorsIndex(bytes, "file");
  CheckOneLine(files.status());
  if (!files.ok()) return;
  for (const auto& [tensor, file] : *files) MEMSERVE_CHECK(!file.empty() && file.find('/') == std::string::npos && file[0] != '.');
}

void ModelConfig(const std::string& bytes) {
  const auto config = engine::ParseModelConfig(bytes, "file");
  CheckOneLine(config.status());
  if (!config.ok()) return;
  MEMSERVE_CHECK(config->dim > 0 && config->n_layers > 0 && config->head_dim % 2 == 0 && config->n_heads % config->n_kv_heads == 0);
  MEMSERVE_CHECK_EQ(static_cast<int>(config->sliding_window.size()), config->n_layers);
  for (const double frequency : RopeFrequencies(config->rope_scaling, config->rope_theta, config->head_dim)) {
    MEMSERVE_CHECK(frequency >= 0 && frequency <= 1);
  }
}

void GenerationConfig(const std::string& bytes) { CheckOneLine(engine::ParseGenerationConfig(bytes, "file").status()); }

}  // namespace memserve::fuzz
