#include "tests/kernels/contract.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"

namespace memserve::kernels {
namespace {

std::string Place(int64_t i, const std::vector<int64_t>& shape) {
  std::vector<int64_t> at(shape.size());
  for (size_t d = shape.size(); d-- > 0; i /= std::max<int64_t>(shape[d], 1)) at[d] = i % std::max<int64_t>(shape[d], 1);
  return absl::StrCat("[", absl::StrJoin(at, ", "), "]");
}

int64_t SizeOfShape(const std::vector<int64_t>& shape) {
  int64_t size = 1;
  for (int64_t extent : shape) size *= extent;
  return size;
}

// How far outside its tolerance; 0 is inside.
double Excess(float actual, float expected, double tolerance) {
  if (std::isnan(expected)) return std::isnan(actual) ? 0 : std::numeric_limits<double>::infinity();
  if (actual == expected) return 0;
  const double difference = std::abs(double{actual} - expected);
  if (difference <= tolerance) return 0;
  return std::isnan(difference) ? std::numeric_limits<double>::infinity() : difference - tolerance;
}

}  // namespace

void PrintTo(const BackendCase& backend, std::ostream* out) {
  *out << backend.name;
  if (backend.name == "cpu") *out << "_" << backend.threads << "_threads_" << backend.isa;
}

std::unique_ptr<Backend> Make(const BackendCase& backend) {
  if (backend.name == "reference") return NewReferenceBackend();
  auto cpu = NewCpuBackend({.threads = backend.threads, .isa = backend.isa});
  if (!cpu.ok()) std::fprintf(stderr, "%s\n", cpu.status().ToString().c_str());
  MEMSERVE_CHECK(cpu.ok());
  return *std::move(cpu);
}

std::vector<BackendCase> CpuBackends() {
  static const std::vector<BackendCase> backends = [] {
    std::vector<BackendCase> found = {{"cpu", 1}, {"cpu", 2}};
    for (const char* isa : {"SCALAR", "EMU128", "SSE2", "SSSE3", "SSE4", "AVX2", "AVX3", "AVX3_DL", "AVX3_ZEN4", "AVX3_SPR", "NEON",
                            "NEON_BF16", "SVE", "SVE2", "SVE_256", "SVE2_128"}) {
      if (NewCpuBackend({.threads = 1, .isa = isa}).ok()) found.push_back({"cpu", 2, isa});
    }
    return found;
  }();
  return backends;
}

std::vector<BackendCase> AllBackends() {
  std::vector<BackendCase> backends = CpuBackends();
  backends.insert(backends.begin(), {"reference"});
  return backends;
}

std::vector<float> Reals(int seed, int64_t count, float low, float high) {
  std::mt19937_64 random(seed);
  std::vector<float> values(count);
  for (float& value : values) value = low + (high - low) * static_cast<float>(random() >> 40) * 0x1p-24f;
  return values;
}

std::vector<float> Integers(int seed, int64_t count, int low, int high) {
  std::mt19937_64 random(seed);
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(low + static_cast<int>(random() % (high - low + 1)));
  return values;
}

std::vector<int32_t> Indices(int seed, int64_t count, int32_t low, int32_t high) {
  std::mt19937_64 random(seed);
  std::vector<int32_t> values(count);
  for (int32_t& value : values) value = low + static_cast<int32_t>(random() % (int64_t{high} - low + 1));
  return values;
}

std::vector<float> RoundedTo(DType dtype, std::vector<float> values) {
  for (float& value : values) value = dtype == DType::kBF16 ? ToFloat(ToBFloat16(value)) : value;
  return values;
}

StoredRows StoredAs(DType format, const std::vector<float>& values, int64_t dim) {
  StoredRows stored{RoundedTo(format, values), std::vector<float>(dim == 0 ? 0 : values.size() / dim, 1.0f)};
  if (format != DType::kI8 && format != DType::kI4) return stored;
  const float most = format == DType::kI8 ? 127.0f : 7.0f;
  for (size_t row = 0; row < stored.scales.size(); ++row) {
    float largest = 0;
    for (int64_t c = 0; c < dim; ++c) largest = std::max(largest, std::abs(values[row * dim + c]));
    const float scale = stored.scales[row] = largest / most;
    for (int64_t c = 0; c < dim; ++c) {
      float& code = stored.codes[row * dim + c];
      code = scale == 0 ? 0.0f : static_cast<float>(static_cast<int>(std::nearbyint(values[row * dim + c] / scale)));
    }
  }
  return stored;
}

std::vector<float> Absolute(std::vector<float> values) {
  for (float& value : values) value = std::abs(value);
  return values;
}

std::unique_ptr<WeightMatrix> NewWeights(Backend& backend, const WeightMatrixSpec& spec, const std::vector<float>& values) {
  MEMSERVE_CHECK_EQ(static_cast<int64_t>(values.size()), spec.groups * spec.n * spec.k);
  std::unique_ptr<WeightMatrix> weights = *backend.NewWeightMatrix(spec);
  for (int64_t group = 0; group < spec.groups; ++group) {
    weights->Store(group, 0, spec.n, values.data() + group * spec.n * spec.k, DType::kF32, spec.k);
  }
  return weights;
}

std::unique_ptr<RowStore> NewTable(Backend& backend, const RowStoreSpec& spec, const std::vector<float>& values) {
  MEMSERVE_CHECK_EQ(static_cast<int64_t>(values.size()), spec.rows * spec.dim);
  std::unique_ptr<RowStore> table = *backend.NewRowStore(spec);
  table->Store(0, spec.rows, values.data(), DType::kF32);
  return table;
}

testing::AssertionResult Near(const std::vector<float>& actual, const std::vector<float>& expected,
                              const std::vector<double>& tolerance, const std::vector<int64_t>& shape) {
  const int64_t size = SizeOfShape(shape);
  MEMSERVE_CHECK_EQ(static_cast<int64_t>(actual.size()), size);
  MEMSERVE_CHECK_EQ(static_cast<int64_t>(expected.size()), size);
  MEMSERVE_CHECK_EQ(static_cast<int64_t>(tolerance.size()), size);
  int64_t worst = -1, outside = 0;
  double worst_excess = 0;
  for (int64_t i = 0; i < size; ++i) {
    const double excess = Excess(actual[i], expected[i], tolerance[i]);
    if (excess > 0) ++outside;
    if (excess > worst_excess) {
      worst = i;
      worst_excess = excess;
    }
  }
  if (outside == 0) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "worst element " << Place(worst, shape) << ": " << absl::StrFormat("%.9g", actual[worst])
                                     << " where " << absl::StrFormat("%.9g", expected[worst]) << " is expected, tolerance "
                                     << tolerance[worst] << "; " << outside << " of " << size << " elements differ";
}

testing::AssertionResult Near(const std::vector<float>& actual, const std::vector<float>& expected, double tolerance,
                              const std::vector<int64_t>& shape) {
  return Near(actual, expected, std::vector<double>(expected.size(), tolerance), shape);
}

testing::AssertionResult NearRelative(const std::vector<float>& actual, const std::vector<float>& expected, double epsilons,
                                      const std::vector<int64_t>& shape) {
  std::vector<double> tolerance;
  for (float value : expected) tolerance.push_back(epsilons * kEpsilon * std::abs(value) + std::numeric_limits<float>::min());
  return Near(actual, expected, tolerance, shape);
}

testing::AssertionResult SameBits(const std::vector<float>& actual, const std::vector<float>& expected,
                                  const std::vector<int64_t>& shape) {
  const testing::AssertionResult equal = Near(actual, expected, 0.0, shape);
  if (!equal) return equal;
  for (size_t i = 0; i < actual.size(); ++i) {  // what == does not tell apart: ±0 and NaN
    uint32_t actual_bits, expected_bits;
    std::memcpy(&actual_bits, &actual[i], sizeof(float));
    std::memcpy(&expected_bits, &expected[i], sizeof(float));
    if (actual_bits == expected_bits) continue;
    return testing::AssertionFailure() << "element " << Place(i, shape) << ": bits "
                                       << absl::StrFormat("%08x where %08x", actual_bits, expected_bits) << " are expected";
  }
  return testing::AssertionSuccess();
}

}  // namespace memserve::kernels
