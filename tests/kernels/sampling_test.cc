#include "kernels/sampling.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "kernels/random.h"
#include "tests/kernels/contract.h"

namespace memserve::kernels {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Result {
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;
};

Result Sampled(Backend& backend, const std::vector<float>& logits, const std::vector<SamplingSlot>& slots) {
  const int64_t count = slots.size(), vocab_size = count == 0 ? 5 : logits.size() / count;
  const DeviceTensor<float, 2> device_logits(backend, {count, vocab_size}, logits);
  const DeviceTensor<SamplingSlot, 1> device_slots(backend, {count}, slots);
  const DeviceTensor<int32_t, 1> tokens(backend, {count});
  const DeviceTensor<float, 1> logprobs(backend, {count});
  backend.Sample({.logits = device_logits, .slots = device_slots, .tokens = tokens, .logprobs = logprobs});
  return {tokens.Read(), logprobs.Read()};
}

// The tokens drawn at positions 0 … draws − 1 from one row of logits.
std::vector<int32_t> Draw(Backend& backend, const std::vector<float>& logits, SamplingSlot slot, int draws) {
  std::vector<float> all;
  std::vector<SamplingSlot> slots;
  for (int i = 0; i < draws; ++i) {
    all.insert(all.end(), logits.begin(), logits.end());
    slot.position = i;
    slots.push_back(slot);
  }
  return Sampled(backend, all, slots).tokens;
}

std::vector<float> Logs(std::vector<float> p) {
  for (float& value : p) value = std::log(value);
  return p;
}

double LogSoftmax(const std::vector<float>& logits, int64_t id) {
  double total = 0;
  for (float logit : logits) total += std::exp(double{logit} - logits[id]);
  return -std::log(total);
}

class SampleTest : public ContractTest {};
MEMSERVE_FOR_ALL_BACKENDS(SampleTest);

TEST_P(SampleTest, TakesTheLowestIdAmongTheLargestWhenGreedy) {
  EXPECT_EQ(Sampled(backend(), {1, 3, 2, 3}, {{}}).tokens, std::vector<int32_t>{1});
  EXPECT_EQ(Sampled(backend(), {5}, {{}}).tokens, std::vector<int32_t>{0});
  for (int64_t vocab_size : {1, 2, 15, 16, 17, 33, 257, 32001}) {
    for (int64_t largest : {int64_t{0}, vocab_size / 2, vocab_size - 1}) {
      std::vector<float> logits = Reals(1, vocab_size);
      logits[largest] = logits[vocab_size - 1] = 2;
      EXPECT_EQ(Sampled(backend(), logits, {{}}).tokens, std::vector<int32_t>{static_cast<int32_t>(largest)}) << vocab_size;
    }
  }
}

TEST_P(SampleTest, CountsNanAsTheLowest) {
  EXPECT_EQ(Sampled(backend(), {kNan, -5, kNan, -4, kNan}, {{}}).tokens, std::vector<int32_t>{3});
  EXPECT_TRUE(Near(Sampled(backend(), {kNan, 1, kNan, 1}, {{}}).logprobs, {-std::log(2.0f)}, 1e-6, {1}));
  for (int32_t token : Draw(backend(), {kNan, 0, kNan, 0, -kInfinity}, {.temperature = 1, .seed = 1}, 200)) {
    EXPECT_TRUE(token == 1 || token == 3) << token;
  }
}

TEST_P(SampleTest, GivesATokenOfTheVocabularyWhateverTheLogits) {
  for (const std::vector<float>& logits : {std::vector<float>{kNan, kNan, kNan},
                                           {-kInfinity, -kInfinity, -kInfinity},
                                           {0, kInfinity, kInfinity},
                                           {3e38f, -3e38f, 3e38f},
                                           {kInfinity, kNan, -kInfinity}}) {
    for (const SamplingSlot& slot : {SamplingSlot{},
                                     {.temperature = 1},
                                     {.temperature = 1e-30f},
                                     {.temperature = 1e30f},
                                     {.temperature = 1, .top_k = 2},
                                     {.temperature = 1, .top_p = 0.5f}}) {
      const int32_t token = Sampled(backend(), logits, {slot}).tokens[0];
      EXPECT_GE(token, 0);
      EXPECT_LT(token, 3);
    }
  }
}

TEST_P(SampleTest, TakesTheFirstOfTheLargestWhereThereIsNoDistribution) {
  for (float temperature : {0.0f, 1.0f}) {
    EXPECT_EQ(Sampled(backend(), {-kInfinity, kNan, -kInfinity}, {{.temperature = temperature, .seed = 5}}).tokens[0], 0);
    EXPECT_EQ(Sampled(backend(), {7, kInfinity, kInfinity}, {{.temperature = temperature, .seed = 5}}).tokens[0], 1);
  }
}

TEST_P(SampleTest, DrawsWithTheFrequenciesOfTheSoftmax) {
  constexpr int kDraws = 20000;
  const std::vector<float> p = {0.4f, 0.05f, 0.2f, 0.01f, 0.14f, 0.1f, 0.1f};
  for (float temperature : {1.0f, 2.0f}) {
    for (const auto& [top_k, top_p] : {std::pair<int32_t, float>{0, 1}, {3, 1}, {0, 0.75f}, {5, 0.9f}}) {
      // top_k 3: {0.4, 0.2, 0.14}. top_p is applied to what top_k left, at the temperature.
      std::vector<int> order = {0, 2, 4, 5, 6, 1, 3};  // by p, ties: the lower id first
      std::vector<double> q(7);
      double mass = 0, prefix = 0;
      if (top_k > 0) order.resize(top_k);
      for (int id : order) mass += q[id] = std::pow(p[id], 1 / temperature);
      for (int id : order) {
        if (prefix >= top_p * mass) q[id] = 0;
        prefix += q[id];
      }
      std::vector<int> count(7);
      for (int32_t token :
           Draw(backend(), Logs(p), {.temperature = temperature, .top_k = top_k, .top_p = top_p, .seed = 7}, kDraws)) {
        ++count[token];
      }
      double chi_square = 0;
      for (int id = 0; id < 7; ++id) {
        const double expected = kDraws * q[id] / prefix;
        if (expected == 0) {
          EXPECT_EQ(count[id], 0) << "token " << id << " was cut";
        } else {
          chi_square += (count[id] - expected) * (count[id] - expected) / expected;
        }
      }
      EXPECT_LT(chi_square, 22.5) << "top_k " << top_k << ", top_p " << top_p;  // 6 degrees of freedom: once in a thousand
    }
  }
}

TEST_P(SampleTest, FallsWhereTheUniformNumberFallsInIdOrderWithoutCuts) {
  const std::vector<float> p = {0.1f, 0.5f, 0.15f, 0.25f};
  const std::vector<int32_t> tokens = Draw(backend(), Logs(p), {.temperature = 1, .seed = 3, .choice = 2}, 500);
  for (int i = 0; i < 500; ++i) {
    const double u = Uniform(3, 2, i);
    EXPECT_EQ(tokens[i], u < 0.1 ? 0 : u < 0.6 ? 1 : u < 0.75 ? 2 : 3) << "u " << u;
  }
}

TEST_P(SampleTest, FallsWhereTheUniformNumberFallsLargestFirstWithCuts) {
  const std::vector<float> p = {0.1f, 0.5f, 0.15f, 0.25f};
  const std::vector<int32_t> top_k = Draw(backend(), Logs(p), {.temperature = 1, .top_k = 3, .seed = 3}, 500);
  const std::vector<int32_t> top_p = Draw(backend(), Logs(p), {.temperature = 1, .top_p = 0.7f, .seed = 3}, 500);
  for (int i = 0; i < 500; ++i) {
    const double u = Uniform(3, 0, i);
    EXPECT_EQ(top_k[i], u * 0.9 < 0.5 ? 1 : u * 0.9 < 0.75 ? 3 : 2) << "u " << u;
    EXPECT_EQ(top_p[i], u * 0.75 < 0.5 ? 1 : 3) << "u " << u;
  }
}

TEST_P(SampleTest, AlwaysKeepsTheLargest) {
  const std::vector<float> logits = Reals(1, 100);
  const int32_t largest = std::max_element(logits.begin(), logits.end()) - logits.begin();
  for (const SamplingSlot& slot : {SamplingSlot{.temperature = 1, .top_k = 1},
                                   {.temperature = 1, .top_p = 0},
                                   {.temperature = 1, .top_p = 1e-6f},
                                   {.temperature = 1e-6f},
                                   {.temperature = 5, .top_k = 1, .top_p = 0.1f}}) {
    EXPECT_THAT(Draw(backend(), logits, slot, 50), testing::Each(largest));
  }
}

TEST_P(SampleTest, PrefersLowerIdsAmongEqualLogitsAtTheCut) {
  const std::vector<float> logits(40, 1.0f);
  for (int32_t token : Draw(backend(), logits, {.temperature = 1, .top_k = 3, .seed = 1}, 200)) EXPECT_LT(token, 3);
  for (int32_t token : Draw(backend(), logits, {.temperature = 1, .top_p = 0.1f, .seed = 1}, 200)) EXPECT_LT(token, 5);
}

TEST_P(SampleTest, CutsNothingWhenTopKCoversTheVocabulary) {
  const std::vector<float> logits = Reals(1, 9, -3, 3);
  const std::vector<int32_t> all = Draw(backend(), logits, {.temperature = 1, .seed = 1}, 300);
  EXPECT_EQ(Draw(backend(), logits, {.temperature = 1, .top_k = 9, .seed = 1}, 300), all);
  EXPECT_EQ(Draw(backend(), logits, {.temperature = 1, .top_k = 1000, .seed = 1}, 300), all);
}

TEST_P(SampleTest, DependsOnTheSlotAloneAndNotOnItsPlace) {
  constexpr int64_t kVocab = 301;
  std::vector<float> logits;
  std::vector<SamplingSlot> slots;
  for (uint32_t i = 0; i < 40; ++i) {
    const std::vector<float> row = Reals(i, kVocab, -4, 4);
    logits.insert(logits.end(), row.begin(), row.end());
    slots.push_back({.temperature = 0.25f * (i % 5),
                     .top_k = static_cast<int32_t>(i % 3 * 20),
                     .top_p = i % 4 == 0 ? 0.8f : 1,
                     .seed = uint64_t{i} << 33 | i,
                     .choice = i % 2,
                     .position = i * 7});
  }
  const Result all = Sampled(backend(), logits, slots);
  for (int64_t i = 0; i < 40; ++i) {
    const Result alone = Sampled(backend(), {logits.begin() + i * kVocab, logits.begin() + (i + 1) * kVocab}, {slots[i]});
    EXPECT_EQ(alone.tokens[0], all.tokens[i]);
    EXPECT_TRUE(SameBits(alone.logprobs, {all.logprobs[i]}, {1}));
  }
  const std::vector<float> same(7 * kVocab, 0.0f);
  EXPECT_THAT(Sampled(backend(), same, std::vector<SamplingSlot>(7, {.temperature = 1, .seed = 9})).tokens,
              testing::Each(Sampled(backend(), std::vector<float>(kVocab, 0.0f), {{.temperature = 1, .seed = 9}}).tokens[0]));
}

TEST_P(SampleTest, DrawsAnewForEachSeedChoiceAndPosition) {
  const std::vector<float> flat(1000, 0.0f);
  std::vector<int32_t> tokens;
  for (const SamplingSlot& slot : {SamplingSlot{.temperature = 1},
                                   {.temperature = 1, .seed = 1},
                                   {.temperature = 1, .seed = uint64_t{1} << 32},
                                   {.temperature = 1, .choice = 1},
                                   {.temperature = 1, .position = 1}}) {
    tokens.push_back(Sampled(backend(), flat, {slot}).tokens[0]);
    EXPECT_EQ(tokens.back(), static_cast<int32_t>(1000 * Uniform(slot.seed, slot.choice, slot.position)));
  }
  std::sort(tokens.begin(), tokens.end());
  EXPECT_EQ(std::unique(tokens.begin(), tokens.end()), tokens.end());
}

TEST_P(SampleTest, AgreesWithTheReference) {
  const auto reference = NewReferenceBackend();
  for (int64_t vocab_size : {1, 3, 17, 100, 1001, 32003}) {
    std::vector<float> logits;
    std::vector<SamplingSlot> slots;
    const uint32_t count = vocab_size > 10000 ? 9 : 60;
    for (uint32_t i = 0; i < count; ++i) {
      const std::vector<float> row = Reals(i, vocab_size, -8, 8);
      logits.insert(logits.end(), row.begin(), row.end());
      slots.push_back({.temperature = 0.3f * (i % 6),
                       .top_k = std::array{0, 1, 5, 40}[i % 4],
                       .top_p = std::array{1.0f, 0.9f, 0.5f}[i % 3],
                       .seed = i,
                       .position = i});
    }
    const Result actual = Sampled(backend(), logits, slots), expected = Sampled(*reference, logits, slots);
    EXPECT_EQ(actual.tokens, expected.tokens) << "vocab_size " << vocab_size;
    EXPECT_TRUE(Near(actual.logprobs, expected.logprobs, 32 * kEpsilon * 20, {count})) << "vocab_size " << vocab_size;
  }
}

TEST_P(SampleTest, ReportsLogprobsOfThePlainLogits) {
  const std::vector<float> logits = {1, 2, 3, -1};
  const float expected[] = {static_cast<float>(LogSoftmax(logits, 0)), static_cast<float>(LogSoftmax(logits, 1)),
                            static_cast<float>(LogSoftmax(logits, 2)), static_cast<float>(LogSoftmax(logits, 3))};
  for (uint32_t position = 0; position < 20; ++position) {
    const Result result = Sampled(backend(), logits, {{.temperature = 3, .top_k = 2, .position = position}});
    EXPECT_TRUE(Near(result.logprobs, {expected[result.tokens[0]]}, 4 * kEpsilon * 5, {1}));
  }
}

TEST_P(SampleTest, DoesNothingWithoutSlots) { EXPECT_TRUE(Sampled(backend(), {}, {}).tokens.empty()); }

class TokenLogprobTest : public ContractTest {
 protected:
  struct Scored {
    std::vector<float> logprobs;
    std::vector<int32_t> is_greedy;
  };
  Scored Score(const std::vector<float>& logits, const std::vector<int32_t>& targets) {
    const int64_t count = targets.size(), vocab_size = count == 0 ? 5 : logits.size() / count;
    const DeviceTensor<float, 2> device_logits(backend(), {count, vocab_size}, logits);
    const DeviceTensor<int32_t, 1> device_targets(backend(), {count}, targets), is_greedy(backend(), {count});
    const DeviceTensor<float, 1> logprobs(backend(), {count});
    backend().TokenLogprob({.logits = device_logits, .targets = device_targets, .logprobs = logprobs, .is_greedy = is_greedy});
    return {logprobs.Read(), is_greedy.Read()};
  }
};
MEMSERVE_FOR_ALL_BACKENDS(TokenLogprobTest);

TEST_P(TokenLogprobTest, ScoresTargetsAndSaysWhichAreGreedy) {
  const Scored scored = Score({0, 0, 0, 0, 0, 0, 0, 0, 9, 1, 9, 2, 9, 1, 9, 2, 5, 5, 5, 5}, {0, 3, 2, 0, -1});
  EXPECT_EQ(scored.is_greedy, (std::vector<int32_t>{1, 0, 0, 1, 0}));
  const float quarter = -std::log(4.0f), half = LogSoftmax({9, 1, 9, 2}, 0);
  EXPECT_TRUE(Near(scored.logprobs, {quarter, quarter, half, half, 0}, 1e-6, {5}));
  EXPECT_EQ(scored.logprobs[4], 0);
}

TEST_P(TokenLogprobTest, CountsNanAsTheLowest) {
  const Scored scored = Score({kNan, 1, kNan, kNan, 1, kNan, kNan, kNan, 1}, {1, 0, 2});
  EXPECT_EQ(scored.is_greedy, (std::vector<int32_t>{1, 0, 1}));
  EXPECT_EQ(scored.logprobs, (std::vector<float>{0, -kInfinity, 0}));
}

TEST_P(TokenLogprobTest, AgreesWithSampleBitForBit) {
  for (int64_t vocab_size : {1, 7, 100, 1001, 32003}) {
    constexpr int64_t kSlots = 5;
    const std::vector<float> logits = Reals(1, kSlots * vocab_size, -30, 30);
    const Result sampled = Sampled(backend(), logits, std::vector<SamplingSlot>(kSlots));
    const Scored scored = Score(logits, sampled.tokens);
    EXPECT_TRUE(SameBits(scored.logprobs, sampled.logprobs, {kSlots})) << "vocab_size " << vocab_size;
    EXPECT_THAT(scored.is_greedy, testing::Each(1));
    for (int64_t s = 0; s < kSlots; ++s) {
      const std::vector<float> row(logits.begin() + s * vocab_size, logits.begin() + (s + 1) * vocab_size);
      EXPECT_NEAR(scored.logprobs[s], LogSoftmax(row, sampled.tokens[s]), 1e-5);
    }
  }
}

class SelectRowsTest : public ContractTest {};
MEMSERVE_FOR_ALL_BACKENDS(SelectRowsTest);

TEST_P(SelectRowsTest, CopiesTheRowsAskedFor) {
  for (int64_t dim : {1, 3, 16, 33, 1000}) {
    const std::vector<float> x = Reals(1, 6 * dim);
    for (const std::vector<int32_t>& chosen : {std::vector<int32_t>{}, {5}, {0, 0, 3}, {5, 4, 3, 2, 1, 0, 5}}) {
      const int64_t count = chosen.size();
      const DeviceTensor<float, 2> device_x(backend(), {6, dim}, x), out(backend(), {count, dim});
      const DeviceTensor<int32_t, 1> rows(backend(), {count}, chosen);
      backend().SelectRows({.x = device_x, .rows = rows, .out = out});
      std::vector<float> expected;
      for (int32_t row : chosen) expected.insert(expected.end(), x.begin() + row * dim, x.begin() + (row + 1) * dim);
      EXPECT_TRUE(SameBits(out.Read(), expected, {count, dim}));
    }
  }
}

}  // namespace
}  // namespace memserve::kernels
