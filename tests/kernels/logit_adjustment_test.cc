#include "kernels/logit_adjustment.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "tests/kernels/contract.h"

namespace memserve::kernels {
namespace {

using ::testing::ElementsAre;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kLowest = -std::numeric_limits<float>::infinity();

struct Lists {
  std::vector<int32_t> seen_tokens = {}, seen_counts = {};
  std::vector<int32_t> bias_tokens = {};
  std::vector<float> bias_values = {};
  std::vector<std::vector<uint32_t>> masks = {};
};

class AdjustLogitsTest : public ContractTest {
 protected:
  std::vector<float> Adjusted(const std::vector<float>& logits, const std::vector<LogitAdjustment>& adjustments, const Lists& lists = {}) {
    const int64_t slots = adjustments.size(), vocab_size = slots == 0 ? 5 : logits.size() / slots, words = (vocab_size + 31) / 32;
    std::vector<uint32_t> masks;
    for (const auto& mask : lists.masks) masks.insert(masks.end(), mask.begin(), mask.end());
    const DeviceTensor<float, 2> in(backend(), {slots, vocab_size}, logits), out(backend(), {slots, vocab_size});
    backend().AdjustLogits({.logits = in,
                            .adjustments = DeviceTensor<LogitAdjustment, 1>(backend(), {slots}, adjustments),
                            .seen_tokens = Of(lists.seen_tokens),
                            .seen_counts = Of(lists.seen_counts),
                            .bias_tokens = Of(lists.bias_tokens),
                            .bias_values = Of(lists.bias_values),
                            .masks = DeviceTensor<uint32_t, 2>(backend(), {static_cast<int64_t>(lists.masks.size()), words}, masks),
                            .out = out});
    return out.Read();
  }
  template <typename T>
  DeviceTensor<T, 1> Of(const std::vector<T>& values) {
    return DeviceTensor<T, 1>(backend(), {static_cast<int64_t>(values.size())}, values);
  }
};
MEMSERVE_FOR_ALL_BACKENDS(AdjustLogitsTest);

TEST_P(AdjustLogitsTest, LeavesTheBitsAloneWhereNothingIsAsked) {
  const std::vector<float> logits = Reals(1, 3 * 67, -5, 5);
  EXPECT_TRUE(SameBits(Adjusted(logits, std::vector<LogitAdjustment>(3, {.temperature = 1})), logits, {3, 67}));
  EXPECT_THAT(Adjusted({}, {}), ::testing::IsEmpty());
  EXPECT_THAT(Adjusted({1, kNan}, {{}}), ElementsAre(1, kLowest));
}

TEST_P(AdjustLogitsTest, PenalisesWhatWasSeenAndWhatWasDrawn) {
  // Token 0 stood in the prompt, 1 was drawn twice, 2 once; token 3 is new.
  const Lists lists{.seen_tokens = {0, 1, 2}, .seen_counts = {0, 2, 1}};
  EXPECT_THAT(Adjusted({4, 2, -2, 1}, {{.repetition_penalty = 2, .seen_end = 3}}, lists), ElementsAre(2, 1, -4, 1));
  EXPECT_THAT(Adjusted({4, 2, -2, 1}, {{.frequency_penalty = 0.5f, .seen_end = 3}}, lists), ElementsAre(4, 1, -2.5f, 1));
  EXPECT_THAT(Adjusted({4, 2, -2, 1}, {{.presence_penalty = 0.5f, .seen_end = 3}}, lists), ElementsAre(4, 1.5f, -2.5f, 1));
  EXPECT_THAT(Adjusted({4, 2, -2, 1}, {{.repetition_penalty = 2, .frequency_penalty = 1, .presence_penalty = 3, .seen_end = 3}}, lists),
              ElementsAre(2, 1 - 5, -4 - 4, 1))
      << "repetition first";
}

TEST_P(AdjustLogitsTest, AddsBiasBansAndMasks) {
  const Lists lists{.bias_tokens = {2, 0}, .bias_values = {1.5f, kLowest}, .masks = {{0b1011}, {0b0100}}};
  EXPECT_THAT(Adjusted({1, 2, 3, 4}, {{.bias_end = 2}}, lists), ElementsAre(kLowest, 2, 4.5f, 4));
  EXPECT_THAT(Adjusted({1, 2, 3, 4}, {{.mask_row = 0}}, lists), ElementsAre(1, 2, kLowest, 4));
  EXPECT_THAT(Adjusted({1, 2, 3, 4}, {{.bias_end = 1, .mask_row = 1}}, lists), ElementsAre(kLowest, kLowest, 4.5f, kLowest));
  EXPECT_THAT(Adjusted({std::numeric_limits<float>::infinity(), 2}, {{.bias_begin = 1, .bias_end = 2}}, lists), ElementsAre(kLowest, 2));
}

TEST_P(AdjustLogitsTest, EachSlotHasItsOwnRangeOfTheLists) {
  const Lists lists{.seen_tokens = {0, 1, 1}, .seen_counts = {1, 1, 1}, .bias_tokens = {0, 2}, .bias_values = {1, 2}};
  EXPECT_THAT(Adjusted({1, 1, 1, 1, 1, 1}, {{.presence_penalty = 1, .seen_end = 2, .bias_end = 1},
                                            {.presence_penalty = 1, .seen_begin = 2, .seen_end = 3, .bias_begin = 1, .bias_end = 2}},
                       lists),
              ElementsAre(1, 0, 1, 1, 0, 3));
}

TEST_P(AdjustLogitsTest, MinPCutsWhatIsFarLessLikelyThanTheLikeliest) {
  const std::vector<float> logits = {std::log(0.5f), std::log(0.3f), std::log(0.15f), std::log(0.05f)};
  EXPECT_THAT(Adjusted(logits, {{.min_p = 0.4f, .temperature = 1}}), ElementsAre(logits[0], logits[1], kLowest, kLowest));
  EXPECT_THAT(Adjusted(logits, {{.min_p = 0.4f, .temperature = 2}}), ElementsAre(logits[0], logits[1], logits[2], kLowest));
  EXPECT_THAT(Adjusted(logits, {{.min_p = 1, .temperature = 1}}), ElementsAre(logits[0], kLowest, kLowest, kLowest));
  EXPECT_THAT(Adjusted(logits, {{.min_p = 1, .temperature = 0}}), ElementsAre(logits[0], logits[1], logits[2], logits[3])) << "greedy";
}

TEST_P(AdjustLogitsTest, TypicalPKeepsWhatIsNearTheEntropy) {
  // Entropy 1.1421; surprises 0.6931, 1.2040, 1.8971, 2.9957: nearest are 0.3, then 0.5, 0.15, 0.05.
  const std::vector<float> logits = {std::log(0.5f), std::log(0.3f), std::log(0.15f), std::log(0.05f)};
  EXPECT_THAT(Adjusted(logits, {{.typical_p = 0.2f, .temperature = 1}}), ElementsAre(kLowest, logits[1], kLowest, kLowest));
  EXPECT_THAT(Adjusted(logits, {{.typical_p = 0.7f, .temperature = 1}}), ElementsAre(logits[0], logits[1], kLowest, kLowest));
  EXPECT_THAT(Adjusted(logits, {{.typical_p = 0.9f, .temperature = 1}}), ElementsAre(logits[0], logits[1], logits[2], kLowest));
}

TEST_P(AdjustLogitsTest, DoesAllOfItOnRandomSlots) {
  std::mt19937 random(3);
  for (const int64_t vocab_size : {1, 31, 32, 33, 1000}) {
    constexpr int64_t kSlots = 7;
    std::vector<LogitAdjustment> adjustments;
    Lists lists;
    for (int64_t s = 0; s < kSlots; ++s) {
      LogitAdjustment a{.repetition_penalty = 1 + static_cast<float>(random() % 3) * 0.3f,
                        .frequency_penalty = static_cast<float>(random() % 3) * 0.2f,
                        .presence_penalty = static_cast<float>(random() % 3) * 0.1f};
      a.seen_begin = static_cast<int32_t>(lists.seen_tokens.size());
      for (int32_t id = 0; id < vocab_size; id += 1 + static_cast<int32_t>(random() % 9)) {
        lists.seen_tokens.push_back(id);
        lists.seen_counts.push_back(static_cast<int32_t>(random() % 4));
      }
      a.seen_end = static_cast<int32_t>(lists.seen_tokens.size());
      a.bias_begin = static_cast<int32_t>(lists.bias_tokens.size());
      lists.bias_tokens.push_back(static_cast<int32_t>(random() % vocab_size));
      lists.bias_values.push_back(static_cast<float>(random() % 100) / 10);
      a.bias_end = a.bias_begin + 1;
      std::vector<uint32_t> mask((vocab_size + 31) / 32);
      for (uint32_t& word : mask) word = random();
      lists.masks.push_back(mask);
      a.mask_row = s % 2 == 0 ? static_cast<int32_t>(s) : -1;
      adjustments.push_back(a);
    }
    const std::vector<float> logits = Reals(4, kSlots * vocab_size, -8, 8);
    const std::vector<float> found = Adjusted(logits, adjustments, lists);
    for (int64_t s = 0; s < kSlots; ++s) {
      for (int64_t id = 0; id < vocab_size; ++id) {
        float expected = logits[s * vocab_size + id];
        const LogitAdjustment& a = adjustments[s];
        for (int32_t i = a.seen_begin; i < a.seen_end; ++i) {
          if (lists.seen_tokens[i] != id) continue;
          expected = expected > 0 ? expected / a.repetition_penalty : expected * a.repetition_penalty;
          const float count = static_cast<float>(lists.seen_counts[i]);
          if (count > 0) expected -= a.frequency_penalty * count + a.presence_penalty;
        }
        if (lists.bias_tokens[s] == id) expected += lists.bias_values[s];
        if (a.mask_row >= 0 && (lists.masks[s][id / 32] >> (id % 32) & 1) == 0) expected = kLowest;
        ASSERT_EQ(found[s * vocab_size + id], expected) << "slot " << s << ", token " << id << " of " << vocab_size;
      }
    }
  }
}

class TopLogprobsTest : public ContractTest {};
MEMSERVE_FOR_ALL_BACKENDS(TopLogprobsTest);

TEST_P(TopLogprobsTest, GivesTheLargestFirstAndTheLowerIdAmongEquals) {
  for (const int64_t vocab_size : {1, 5, 17, 300, 4096}) {
    const int64_t slots = 3, most = std::min<int64_t>(vocab_size, 20);
    std::vector<float> logits = Integers(2, slots * vocab_size, -3, 3);
    logits[0] = kNan;
    const std::vector<int32_t> counts = {static_cast<int32_t>(most), 0, 1};
    const DeviceTensor<int32_t, 2> tokens(backend(), {slots, most});
    const DeviceTensor<float, 2> logprobs(backend(), {slots, most});
    const std::vector<int32_t> chosen = {0, -1, static_cast<int32_t>(vocab_size) - 1, 0, -1, -1};
    const DeviceTensor<float, 2> chosen_logprobs(backend(), {slots, 2});
    backend().TopLogprobs({.logits = DeviceTensor<float, 2>(backend(), {slots, vocab_size}, logits),
                           .counts = DeviceTensor<int32_t, 1>(backend(), {slots}, counts),
                           .tokens = tokens,
                           .logprobs = logprobs,
                           .chosen = DeviceTensor<int32_t, 2>(backend(), {slots, 2}, chosen),
                           .chosen_logprobs = chosen_logprobs});
    logits[0] = kLowest;
    const std::vector<int32_t> found = tokens.Read();
    const std::vector<float> of = logprobs.Read();
    for (int64_t s = 0; s < slots; ++s) {
      std::vector<int32_t> order;
      double total = 0;
      for (int64_t id = 0; id < vocab_size; ++id) {
        order.push_back(static_cast<int32_t>(id));
        total += std::exp(logits[s * vocab_size + id]);
      }
      std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return logits[s * vocab_size + a] > logits[s * vocab_size + b]; });
      for (int64_t c = 2 * s; c < 2 * s + 2; ++c) {
        const double logprob = chosen[c] < 0 ? 0 : logits[s * vocab_size + chosen[c]] - std::log(total);
        if (std::isfinite(logprob)) {
          ASSERT_NEAR(chosen_logprobs.Read()[c], logprob, 1e-5);
        } else if (!std::isnan(logprob)) {
          ASSERT_EQ(chosen_logprobs.Read()[c], logprob);
        }
      }
      for (int64_t r = 0; r < most; ++r) {
        const bool wanted = r < counts[s];
        ASSERT_EQ(found[s * most + r], wanted ? order[r] : -1) << "slot " << s << ", rank " << r << " of " << vocab_size;
        const double logprob = wanted ? logits[s * vocab_size + order[r]] - std::log(total) : 0;
        if (std::isfinite(logprob)) {
          ASSERT_NEAR(of[s * most + r], logprob, 1e-5);
        }
      }
    }
  }
}

}  // namespace
}  // namespace memserve::kernels
