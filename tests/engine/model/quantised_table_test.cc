// Value tables stored as int8 or int4 with a scale per row: the answers are those of the values that they stand for.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "engine/engine.h"
#include "kernels/tensor.h"
#include "tests/support/files.h"
#include "tests/support/golden.h"

namespace memserve::engine {
namespace {

using ::testing::HasSubstr;
using testing::GoldenCase;
using testing::LoadGolden;
using testing::MakeTensor;
using testing::StoredTensor;
using testing::TempFolder;

using Tensors = std::map<std::string, StoredTensor>;

// A golden case's checkpoint with its tensors changed.
void CopyWith(const std::string& from, const TempFolder& to, const std::function<void(Tensors&)>& change) {
  std::filesystem::copy(from, to.path());
  Tensors tensors = testing::ReadTensors(to / "model.safetensors");
  change(tensors);
  testing::WriteTensors(to / "model.safetensors", tensors);
}

bool IsTable(const std::string& name) { return name.find(".feed_forward.values") != std::string::npos && name.ends_with(".weight"); }

std::vector<float> ValuesOf(const StoredTensor& tensor) {
  std::vector<float> values;
  if (tensor.dtype == "F32") {
    values.resize(tensor.bytes.size() / 4);
    std::memcpy(values.data(), tensor.bytes.data(), tensor.bytes.size());
    return values;
  }
  for (size_t i = 0; i < tensor.bytes.size(); i += 2) {
    kernels::BFloat16 value;
    std::memcpy(&value, tensor.bytes.data() + i, 2);
    values.push_back(kernels::ToFloat(value));
  }
  return values;
}

// Every table as I8 or U8 (int4) and scales, or, with `dtype` F32, as the values that those stand for.
void Quantise(Tensors& tensors, const std::string& dtype, float most) {
  Tensors scales;
  for (auto& [name, tensor] : tensors) {
    if (!IsTable(name)) continue;
    const std::vector<float> values = ValuesOf(tensor);
    const int64_t rows = tensor.shape[0], dim = tensor.shape[1];
    std::vector<float> scale(rows), meant;
    std::vector<uint8_t> bytes;
    for (int64_t row = 0; row < rows; ++row) {
      float largest = 0;
      for (int64_t c = 0; c < dim; ++c) largest = std::max(largest, std::abs(values[row * dim + c]));
      scale[row] = largest / most;
      for (int64_t c = 0; c < dim; ++c) {
        const int code = scale[row] == 0 ? 0 : static_cast<int>(std::nearbyint(values[row * dim + c] / scale[row]));
        meant.push_back(scale[row] * static_cast<float>(code));
        if (dtype == "I8") bytes.push_back(static_cast<uint8_t>(code));
        else if (c % 2 == 0) bytes.push_back(static_cast<uint8_t>(code + 8));
        else bytes.back() |= static_cast<uint8_t>((code + 8) << 4);
      }
    }
    if (dtype == "F32") {
      tensor = MakeTensor("F32", {rows, dim}, meant);
    } else {
      tensor = MakeTensor(dtype, {rows, static_cast<int64_t>(bytes.size()) / rows}, bytes);
      scales[name.substr(0, name.size() - 6) + "scale"] = MakeTensor("F32", {rows}, scale);
    }
  }
  tensors.merge(scales);
}


std::vector<float> LogitsOf(const std::string& checkpoint, const GoldenCase& golden, const std::string& backend = "cpu", int ranks = 1,
                            const std::string& table_dtype = "auto") {
  EngineOptions options = testing::ParityOptions(checkpoint);
  options.backend = backend;
  options.table_dtype = table_dtype;
  options.devices.clear();
  for (int r = 0; r < ranks; ++r) options.devices.push_back(r);
  const auto model = testing::LoadModel(options);
  std::vector<std::vector<int32_t>> sequences;
  for (const auto& sequence : golden.sequences) sequences.push_back(sequence.tokens);
  return model->executor->ExecuteForLogits(testing::PrefillBatch(*model, sequences)).value();
}

double WorstDifference(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  double worst = 0;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) worst = std::max(worst, std::abs(double{a[i]} - double{b[i]}));
  return worst;
}

// A: a shared table under both of its layers; B: own tables, 40 wide; D: PEER.
class QuantisedTableTest : public ::testing::TestWithParam<std::tuple<std::string, std::string>> {};
INSTANTIATE_TEST_SUITE_P(Every, QuantisedTableTest, ::testing::Combine(::testing::Values("A", "B", "D"), ::testing::Values("I8", "U8")));

TEST_P(QuantisedTableTest, GivesTheLogitsOfTheValuesItStandsFor) {
  const auto [name, dtype] = GetParam();
  const float most = dtype == "I8" ? 127 : 7;
  const std::string option = dtype == "I8" ? "int8" : "int4";
  const GoldenCase golden = LoadGolden(name);
  const TempFolder quantised, meant;
  CopyWith(golden.checkpoint, quantised, [&](Tensors& tensors) { Quantise(tensors, dtype, most); });
  CopyWith(golden.checkpoint, meant, [&](Tensors& tensors) { Quantise(tensors, "F32", most); });
  const std::vector<float> expected = LogitsOf(meant.path(), golden, "reference", 1, "f32");
  const std::vector<float> cpu = LogitsOf(quantised.path(), golden);
  EXPECT_LT(WorstDifference(cpu, expected), 1e-4);
  EXPECT_LT(WorstDifference(LogitsOf(quantised.path(), golden, "reference"), expected), 1e-4);
  EXPECT_LT(WorstDifference(LogitsOf(quantised.path(), golden, "cpu", 2), expected), 1e-4);
  EXPECT_LT(WorstDifference(LogitsOf(quantised.path(), golden, "cpu", 1, "f32"), expected), 1e-4) << "widened while loading";
  EXPECT_EQ(LogitsOf(golden.checkpoint, golden, "cpu", 1, option), cpu) << "quantised while loading: the same codes, so the same bits";
  EXPECT_GT(WorstDifference(cpu, LogitsOf(golden.checkpoint, golden)), 1e-4) << "quantisation shows";
}

std::string LoadError(const std::string& checkpoint, const std::string& table_dtype = "auto") {
  EngineOptions options = testing::ParityOptions(checkpoint);
  options.table_dtype = table_dtype;
  return std::string(Engine::Create(options).status().message());
}

TEST(QuantisedTableErrorsTest, AreOneLineWithTensorExpectedAndFound) {
  const GoldenCase golden = LoadGolden("A");
  const std::string table = "layers.1.feed_forward.values";
  const auto error_with = [&](const std::function<void(Tensors&)>& change) {
    const TempFolder folder;
    CopyWith(golden.checkpoint, folder, [&](Tensors& tensors) {
      Quantise(tensors, "U8", 7);
      change(tensors);
    });
    return LoadError(folder.path());
  };
  EXPECT_EQ(error_with([](Tensors&) {}), "");
  EXPECT_THAT(error_with([&](Tensors& t) { t.erase(table + ".scale"); }), HasSubstr("tensor '" + table + ".scale' is missing"));
  EXPECT_THAT(error_with([&](Tensors& t) { t[table + ".scale"].dtype = "I32"; }), HasSubstr("tensor '" + table + ".scale' is i32"));
  EXPECT_THAT(error_with([&](Tensors& t) {
                t[table + ".weight"].dtype = "I8";
                t["layers.4.feed_forward.values.weight"].dtype = "I8";
              }),
              HasSubstr("tensor '" + table + ".weight' is int8"));
  EXPECT_THAT(error_with([&](Tensors& t) { t["layers.4.feed_forward.values.scale"].bytes[0] ^= 1; }),
              HasSubstr("tensors '" + table + ".scale' and 'layers.4.feed_forward.values.scale' differ"));
  EXPECT_THAT(LoadError(golden.checkpoint, "int2"), HasSubstr("table_dtype: 'int2' is not one of auto, f32, bf16, int8, int4"));
}

TEST(QuantisedTableInfoTest, SaysFormatAndBytes) {
  EngineOptions options = testing::ParityOptions(LoadGolden("A").checkpoint);
  options.table_dtype = "int4";
  const auto engine = Engine::Create(options).value();
  const ValueTableInfo& table = engine->model().value_tables.at(0);
  EXPECT_EQ(table.format, "int4");
  EXPECT_EQ(table.bytes, table.rows * (table.dim / 2 + 4));
}

}  // namespace
}  // namespace memserve::engine
