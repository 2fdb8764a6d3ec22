#include "kernels/backend.h"

#include <algorithm>

#include "tests/kernels/contract.h"

namespace memserve::kernels {
namespace {

using testing::AllOf;
using testing::HasSubstr;

class BackendTest : public ContractTest {};
MEMSERVE_FOR_ALL_BACKENDS(BackendTest);

TEST_P(BackendTest, GivesZeroedMemory) {
  for (int64_t bytes : {0, 1, 100, 5'000'000}) {
    const auto memory = backend().Allocate(bytes, "test");
    ASSERT_TRUE(memory.ok()) << memory.status();
    EXPECT_EQ(memory->bytes(), bytes);
    std::vector<unsigned char> values(bytes, 1);
    backend().CopyToHost(values.data(), memory->address(), bytes);
    EXPECT_EQ(std::count(values.begin(), values.end(), 0), bytes);
  }
}

TEST_P(BackendTest, GivesBackWhatWasCopiedToTheDevice) {
  const std::vector<float> values = Reals(1, 1001);
  const DeviceTensor<float, 1> tensor(backend(), {1001}, values);
  EXPECT_EQ(tensor.Read(), values);
}

TEST_P(BackendTest, RefusesMoreMemoryThanThereIsAndNamesPurposeAndBytes) {
  const auto memory = backend().Allocate(int64_t{1} << 60, "KV pages");
  EXPECT_EQ(memory.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(memory.status().message()), AllOf(HasSubstr("KV pages"), HasSubstr("1152921504606846976")));
}

TEST_P(BackendTest, RefusesTablesLargerThanTheMachine) {
  const auto table = backend().NewRowStore({.rows = 2'000'000'000, .dim = 65536, .end_column = 65536});
  EXPECT_EQ(table.status().code(), absl::StatusCode::kResourceExhausted);
  const auto weights = backend().NewWeightMatrix({.n = int64_t{1} << 30, .k = int64_t{1} << 28});
  EXPECT_EQ(weights.status().code(), absl::StatusCode::kResourceExhausted);
}

TEST_P(BackendTest, KeepsMemoryAliveAsLongAsItIsHeld) {
  DeviceBuffer copy;
  {
    const DeviceBuffer memory = *backend().Allocate(64, "test");
    copy = memory;
  }
  const std::vector<float> values = Reals(1, 16);
  backend().CopyToDevice(copy.address(), values.data(), 64);
  std::vector<float> read(16);
  backend().CopyToHost(read.data(), copy.address(), 64);
  EXPECT_EQ(read, values);
}

TEST(CpuBackendTest, RunsTheInstructionSetItWasToldAndSaysSo) {
  for (const BackendCase& backend : CpuBackends()) {
    if (backend.isa == "auto") continue;
    EXPECT_EQ(Make(backend)->isa(), backend.isa);
  }
}

TEST(CpuBackendTest, NamesTheInstructionSetsThatRunHereWhenAskedForAnother) {
  const auto backend = NewCpuBackend({.threads = 1, .isa = "MMX"});
  EXPECT_EQ(backend.status().code(), absl::StatusCode::kInvalidArgument);
  const std::string best = Make({"cpu"})->isa();
  EXPECT_THAT(std::string(backend.status().message()), AllOf(HasSubstr("MMX"), HasSubstr(best)));
}

TEST(CpuBackendTest, HasTheThreadsAskedFor) {
  EXPECT_EQ(Make({"cpu", 1})->threads(), 1);
  EXPECT_EQ(Make({"cpu", 3})->threads(), 3);
  EXPECT_GE(Make({"cpu", 0})->threads(), 1);
}

TEST_P(BackendTest, MakingMemoryReadyKeepsWhatIsInIt) {
  constexpr int64_t kBytes = 9 << 20;
  const DeviceBuffer first = *backend().Allocate(kBytes, "test"), second = *backend().Allocate(kBytes / 2, "test");
  const std::vector<char> written(kBytes, 'x');
  backend().CopyToDevice(first.address(), written.data(), kBytes / 2);
  backend().MakeReady({{first.address(), kBytes}, {second.address(), kBytes / 2}});
  backend().CopyToDevice(static_cast<char*>(first.address()) + kBytes / 2, written.data(), kBytes - kBytes / 2);
  std::vector<char> read(kBytes);
  for (int round = 0; round < 20; ++round) {
    backend().CopyToHost(read.data(), first.address(), kBytes);
    ASSERT_EQ(read, written);
  }
  backend().CopyToHost(read.data(), second.address(), kBytes / 2);
  EXPECT_EQ(std::count(read.begin(), read.begin() + kBytes / 2, 0), kBytes / 2);
}

}  // namespace
}  // namespace memserve::kernels
