// Several answers to one request, and what is told beside an answer.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>
#include <thread>

#include "engine/drafts.h"
#include "engine/engine.h"
#include "tests/support/collector.h"
#include "tests/support/engines.h"
#include "tests/support/golden.h"

namespace memserve::engine {
namespace {

using memserve::testing::Collector;
using memserve::testing::ExpectNoPagesLeft;
using memserve::testing::Generate;
using memserve::testing::GenerateChoices;
using memserve::testing::Generated;
using memserve::testing::GoldenCase;
using memserve::testing::LoadGolden;
using memserve::testing::ParityOptions;
using memserve::testing::Score;
using memserve::testing::Start;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

EngineOptions OptionsOfA() { return ParityOptions(std::string(MEMSERVE_GOLDEN_DIR) + "/A/checkpoint"); }

// 40 tokens: two full pages, and a part of one.
GenerateRequest SampledRequest(int max_tokens = 24) {
  GenerateRequest request;
  std::vector<int32_t> prompt(40);
  std::iota(prompt.begin(), prompt.end(), 60);
  request.prompt = prompt;
  request.sampling = {.temperature = 1.0f, .seed = 11u};
  request.stop = {.max_tokens = max_tokens, .ignore_eos = true};
  request.logprobs = true;
  return request;
}

TEST(ChoicesTest, EachIsDrawnWithRandomNumbersOfItsOwnAndTheFirstIsTheOnlyOneOfOne) {
  const std::unique_ptr<Engine> engine = Start(OptionsOfA());
  GenerateRequest request = SampledRequest();
  const Generated one = Generate(*engine, request);
  request.n = 5;
  const std::vector<Generated> five = GenerateChoices(*engine, request);
  ASSERT_EQ(five.size(), 5u);
  EXPECT_EQ(five[0], one);
  std::set<std::vector<int32_t>> different;
  for (size_t choice = 0; choice < five.size(); ++choice) {
    ASSERT_TRUE(five[choice].finished.ok()) << five[choice].finished.status();
    EXPECT_EQ(five[choice].finished->choice, static_cast<int>(choice));
    EXPECT_EQ(five[choice].finished->seed, 11u);
    EXPECT_EQ(five[choice].finished->usage.completion_tokens, 24);
    different.insert(five[choice].token_ids);
  }
  EXPECT_EQ(different.size(), 5u);
  EXPECT_EQ(std::accumulate(five.begin(), five.end(), 0,
                            [](int sum, const Generated& g) { return sum + g.finished->usage.all_completion_tokens; }),
            5 * 24)
      << "told once, with the last";
  ExpectNoPagesLeft(*engine);
}

TEST(ChoicesTest, SharedPagesChangeNothingWhateverTheSteps) {
  GenerateRequest request = SampledRequest();
  request.n = 6;
  request.scheduling.prefix_cache = false;
  EngineOptions options = OptionsOfA();
  const std::vector<Generated> expected = GenerateChoices(*Start(options), request);
  for (const auto& [batch_tokens, depth, pages, threads] :
       {std::tuple{1, 1, 0, 1}, {7, 2, 0, 2}, {64, 1, 10, 2}, {64, 2, 10, 1}, {512, 2, 0, 2}}) {
    options.max_batch_tokens = batch_tokens;
    options.step_depth = depth;
    options.threads = threads;
    // 10 pages of 6 layers' keys and values: the choices do not all fit.
    options.kv_cache_bytes = pages * (int64_t{1} << 14);
    const std::unique_ptr<Engine> engine = Start(options);
    ASSERT_NE(engine, nullptr);
    EXPECT_EQ(GenerateChoices(*engine, request), expected)
        << batch_tokens << " tokens a step, " << depth << " in flight, " << pages << " pages";
    ExpectNoPagesLeft(*engine);
  }
}

TEST(ChoicesTest, ThePromptIsComputedOnce) {
  EngineOptions options = OptionsOfA();
  const std::unique_ptr<Engine> engine = Start(options);
  GenerateRequest request = SampledRequest();
  request.n = 8;
  request.scheduling.prefix_cache = false;
  GenerateChoices(*engine, request);
  // The last token of the prompt is computed for each choice, since each draws from it.
  EXPECT_EQ(engine->load().prompt_tokens, 40 + 7);
}

TEST(ChoicesTest, TheBestOfManyComeFirst) {
  const std::unique_ptr<Engine> engine = Start(OptionsOfA());
  GenerateRequest request = SampledRequest();
  request.n = 7;
  std::vector<Generated> all = GenerateChoices(*engine, request);
  const auto mean = [](const Generated& g) {
    return std::accumulate(g.logprobs.begin(), g.logprobs.end(), 0.0) / static_cast<double>(g.logprobs.size());
  };
  std::stable_sort(all.begin(), all.end(), [&](const Generated& a, const Generated& b) { return mean(a) > mean(b); });
  request.n = 3;
  request.best_of = 7;
  const std::vector<Generated> best = GenerateChoices(*engine, request);
  ASSERT_EQ(best.size(), 3u);
  for (size_t rank = 0; rank < 3; ++rank) EXPECT_EQ(best[rank], all[rank]) << rank;
  EXPECT_EQ(best[2].finished->usage.all_completion_tokens, 7 * 24);
  ExpectNoPagesLeft(*engine);
}

TEST(ChoicesTest, OneEndsWhileOthersGoOnAndACancelEndsAll) {
  const std::unique_ptr<Engine> engine = Start(OptionsOfA());
  GenerateRequest request = SampledRequest(60);
  request.n = 4;
  const std::vector<Generated> whole = GenerateChoices(*engine, request);
  request.stop.token_ids = {whole[2].token_ids[3]};
  const std::vector<Generated> cut = GenerateChoices(*engine, request);
  for (size_t choice = 0; choice < 4; ++choice) {
    const auto found = std::find(whole[choice].token_ids.begin(), whole[choice].token_ids.end(), request.stop.token_ids[0]);
    const std::vector<int32_t> expected(whole[choice].token_ids.begin(),
                                        found == whole[choice].token_ids.end() ? found : found + 1);
    EXPECT_EQ(cut[choice].token_ids, expected) << choice;
    EXPECT_EQ(cut[choice].finished->reason, found == whole[choice].token_ids.end() ? FinishReason::kLength : FinishReason::kStop);
  }

  GenerateRequest endless = SampledRequest(200);
  endless.n = 16;
  const auto collector = std::make_shared<Collector>();
  const std::string id = engine->Generate(endless, collector);
  collector->WaitForFirstDelta();
  engine->Cancel(id);
  EXPECT_EQ(collector->Wait().finished.status().code(), absl::StatusCode::kCancelled);
  ExpectNoPagesLeft(*engine);
  EXPECT_EQ(engine->load().requests, 0);
}

TEST(SpeculationTest, GuessesAreDrawnAsTheyWouldBeWithoutThem) {
  const GoldenCase golden = LoadGolden("A");
  EngineOptions options = OptionsOfA();
  const std::unique_ptr<Engine> engine = Start(options);
  int64_t accepted = 0, guessed = 0;
  for (int i = 0; i < 12; ++i) {
    GenerateRequest request = SampledRequest(120);
    request.prompt = golden.sequences[i % golden.sequences.size()].tokens;
    request.sampling.temperature = i % 2 == 0 ? 0.0f : 0.4f;
    if (i % 3 == 1) request.sampling.repetition_penalty = 1.1f;
    if (i % 3 == 2) request.sampling = {.temperature = 0.7f, .seed = 4u, .frequency_penalty = 0.2f, .penalty_window = 20};
    if (i % 2 == 1) request.sampling.allowed_token_ids = {97, 98, 99};  // so that guesses are often right
    if (i == 7) request.stop.strings = {"aba"};
    if (i == 9) request.sampling.bad_words = {"the", "of"};
    request.top_logprobs = i % 4;
    const Generated plain = Generate(*engine, request);
    request.speculation = SpeculationParams{.max_draft_tokens = 1 + i, .min_ngram = 1};
    const Generated speculative = Generate(*engine, request);
    EXPECT_EQ(speculative, plain) << i;
    ASSERT_EQ(speculative.top_logprobs.size(), plain.top_logprobs.size());
    EXPECT_EQ(plain.finished->usage.draft_tokens, 0);
    guessed += speculative.finished->usage.draft_tokens;
    accepted += speculative.finished->usage.accepted_draft_tokens;
    EXPECT_LE(speculative.finished->usage.accepted_draft_tokens, speculative.finished->usage.draft_tokens);
  }
  EXPECT_GT(accepted, 100);
  EXPECT_GT(guessed, accepted) << "some must be wrong, or taking them back is not tested";
  EXPECT_EQ(engine->load().accepted_draft_tokens, accepted);
  ExpectNoPagesLeft(*engine);
}

TEST(SpeculationTest, RepetitionTakesFewerSteps) {
  const std::unique_ptr<Engine> engine = Start(OptionsOfA());
  GenerateRequest request = SampledRequest(120);
  request.sampling = {.logit_bias = {{42, 1000.0f}}};
  const int64_t before = engine->load().steps;
  request.speculation = SpeculationParams{.max_draft_tokens = 8};
  EXPECT_EQ(Generate(*engine, request).token_ids, std::vector<int32_t>(120, 42));
  EXPECT_LT(engine->load().steps - before, 40);
}

TEST(DraftsTest, GuessesWhatFollowedTheLastTimeAndPausesWhereItIsWrong) {
  Drafts drafts({.max_draft_tokens = 4, .min_ngram = 2, .max_ngram = 3});
  EXPECT_THAT(drafts.Guess({1, 2, 3}, 9), IsEmpty());
  EXPECT_THAT(drafts.Guess({1, 2, 3, 4, 9, 1, 2}, 9), ::testing::ElementsAre(3, 4, 9, 1));
  EXPECT_THAT(drafts.Guess({1, 2, 3, 4, 9, 1, 2}, 2), ::testing::ElementsAre(3, 4));
  EXPECT_THAT(drafts.Guess({5, 1, 2, 3, 6, 1, 2, 4, 5, 1, 2}, 1), ::testing::ElementsAre(3))
      << "the longer match goes before the later";
  EXPECT_THAT(drafts.Guess({7, 8, 7, 8}, 9), ::testing::ElementsAre(7, 8, 7, 8)) << "a guess goes on with itself";
  EXPECT_THAT(drafts.Guess({3, 1, 3}, 9), IsEmpty()) << "one token is too little";
  for (int i = 0; i < 4; ++i) drafts.Learn(4, 0);
  int guesses = 0;
  for (int i = 0; i < 16; ++i) guesses += !drafts.Guess({7, 8, 7, 8}, 9).empty();
  EXPECT_EQ(guesses, 2);
  drafts.Learn(1, 1);
  EXPECT_EQ(drafts.Guess({7, 8, 7, 8}, 9).size(), 2u);
  EXPECT_EQ(drafts.guessed(), 17);
  EXPECT_EQ(drafts.accepted(), 1);
}

TEST(PromptLogprobsTest, EqualThoseOfScoreWhateverIsCachedAndHoweverItIsCut) {
  const GoldenCase golden = LoadGolden("A");
  for (const int batch_tokens : {512, 5}) {
    EngineOptions options = OptionsOfA();
    options.max_batch_tokens = batch_tokens;
    const std::unique_ptr<Engine> engine = Start(options);
    for (int round = 0; round < 2; ++round) {  // the second finds the prompt in the cache
      for (const memserve::testing::GoldenSequence& sequence : golden.sequences) {
        if (sequence.tokens.size() < 3) continue;
        ScoreRequest score;
        score.context = std::vector<int32_t>(sequence.tokens.begin(), sequence.tokens.begin() + 1);
        score.continuations = {std::vector<int32_t>(sequence.tokens.begin() + 1, sequence.tokens.end())};
        const std::vector<float> expected = Score(*engine, score)->scores[0].token_logprobs;
        GenerateRequest request = SampledRequest(4);
        request.prompt = sequence.tokens;
        const Generated plain = Generate(*engine, request);
        request.prompt_logprobs = 2;
        const Generated told = Generate(*engine, request);
        EXPECT_EQ(told, plain) << "the answer is the same";
        std::vector<int32_t> ids;
        std::vector<float> logprobs;
        for (const PromptDelta& delta : told.prompt) {
          EXPECT_EQ(delta.first, static_cast<int>(ids.size()) + 1);
          ids.insert(ids.end(), delta.token_ids.begin(), delta.token_ids.end());
          logprobs.insert(logprobs.end(), delta.logprobs.begin(), delta.logprobs.end());
          ASSERT_EQ(delta.top_logprobs.size(), delta.token_ids.size());
          for (size_t i = 0; i < delta.token_ids.size(); ++i) {
            ASSERT_EQ(delta.top_logprobs[i].size(), 2u);
            EXPECT_GE(delta.top_logprobs[i][0].logprob, delta.logprobs[i]);
          }
        }
        EXPECT_EQ(ids, std::vector<int32_t>(sequence.tokens.begin() + 1, sequence.tokens.end()));
        EXPECT_EQ(logprobs, expected);
      }
    }
    ExpectNoPagesLeft(*engine);
  }
}

TEST(EchoTest, ThePromptComesFirstAsTextAndTokens) {
  const std::unique_ptr<Engine> engine = Start(OptionsOfA());
  GenerateRequest request = SampledRequest(4);
  request.prompt = "What is told, is told.";
  request.echo = true;
  const Generated generated = Generate(*engine, request);
  ASSERT_EQ(generated.prompt.size(), 1u);
  EXPECT_EQ(generated.prompt[0].text, "What is told, is told.");
  EXPECT_EQ(generated.prompt[0].first, 0);
  EXPECT_EQ(static_cast<int>(generated.prompt[0].token_ids.size()), generated.finished->usage.prompt_tokens);
}

TEST(ChosenLogprobsTest, AreThoseOfTheModelBesideEachToken) {
  const std::unique_ptr<Engine> engine = Start(OptionsOfA());
  for (const bool biased : {false, true}) {
    GenerateRequest request = SampledRequest(10);
    request.top_logprobs = 3;
    if (biased) request.sampling.banned_token_ids = {65};
    const Generated plain = Generate(*engine, request);
    request.logprob_token_ids = {plain.token_ids[0], 65, plain.top_logprobs[4][1].token_id};
    const Generated told = Generate(*engine, request);
    EXPECT_EQ(told, plain);
    ASSERT_EQ(told.chosen_logprobs.size(), 10u);
    EXPECT_EQ(told.chosen_logprobs[0][0], plain.logprobs[0]);
    EXPECT_EQ(told.chosen_logprobs[4][2], plain.top_logprobs[4][1].logprob);
    EXPECT_TRUE(std::isfinite(told.chosen_logprobs[4][1])) << "of the model's own distribution, before any ban";
    request.top_logprobs = 0;
    EXPECT_EQ(Generate(*engine, request).chosen_logprobs, told.chosen_logprobs);
  }
}

TEST(BadWordsTest, AreNeverSpelledByTheirTokens) {
  const std::unique_ptr<Engine> engine = Start(OptionsOfA());
  GenerateRequest request = SampledRequest(200);
  const std::string text = Generate(*engine, request).text;
  // Three bytes, each a token, that stand in the answer.
  std::string word;
  for (size_t i = 0; i + 3 < text.size() && word.empty(); ++i) {
    if (std::all_of(text.begin() + static_cast<int64_t>(i), text.begin() + static_cast<int64_t>(i) + 3,
                    [](char c) { return c > ' ' && c < 127; }))
      word = text.substr(i, 3);
  }
  ASSERT_FALSE(word.empty());
  request.sampling.bad_words = {word};
  const Generated without = Generate(*engine, request);
  EXPECT_EQ(without.text.find(word), std::string::npos);
  EXPECT_NE(without.text, text);
  EXPECT_NE(without.text.find(word.substr(0, 2)), std::string::npos) << "its beginning is allowed";
}

TEST(StopTest, TheTextThatStopsIsGivenIfAskedFor) {
  const std::unique_ptr<Engine> engine = Start(OptionsOfA());
  GenerateRequest request = SampledRequest(60);
  request.sampling = {};
  const Generated all = Generate(*engine, request);
  request.stop.strings = {all.text.substr(10, 6)};
  request.stop.include_matched = true;
  const Generated with = Generate(*engine, request);
  EXPECT_EQ(with.text, all.text.substr(0, all.text.find(request.stop.strings[0]) + 6));
  EXPECT_EQ(with.finished->stop_string, request.stop.strings[0]);
  request.stop.strings = {};
  request.stop.token_ids = {all.token_ids[5]};
  const Generated by_id = Generate(*engine, request);
  request.stop.include_matched = false;
  EXPECT_GT(by_id.text.size(), Generate(*engine, request).text.size());
}

TEST(TruncateTest, TheLastTokensOfALongPromptAreTakenAndABeginStays) {
  const std::unique_ptr<Engine> engine = Start(OptionsOfA());
  GenerateRequest request = SampledRequest(8);
  std::vector<int32_t> tokens = std::get<std::vector<int32_t>>(request.prompt);
  request.truncate_prompt = 12;
  const Generated cut = Generate(*engine, request);
  EXPECT_EQ(cut.finished->usage.prompt_tokens, 12);
  GenerateRequest last = SampledRequest(8);
  last.prompt = std::vector<int32_t>(tokens.end() - 12, tokens.end());
  EXPECT_EQ(cut, Generate(*engine, last));
  request.prompt = std::string(400, 'x') + "end";  // more than the context
  request.echo = true;
  const Generated text = Generate(*engine, request);
  ASSERT_TRUE(text.finished.ok()) << text.finished.status();
  EXPECT_EQ(text.prompt[0].token_ids.front(), 256) << "begin of sequence";
  EXPECT_EQ(text.prompt[0].text, std::string(8, 'x') + "end");
}

TEST(ChoicesTest, WrongRequestsNameFieldValueAndLimit) {
  const std::unique_ptr<Engine> engine = Start(OptionsOfA());
  const auto error = [&](const std::function<void(GenerateRequest&)>& change) {
    GenerateRequest request = SampledRequest(4);
    change(request);
    return std::string(Generate(*engine, request).finished.status().message());
  };
  EXPECT_EQ(error([](auto& r) { r.n = 0; }), "n: 0 is not in [1, 128]");
  EXPECT_EQ(error([](auto& r) { r.n = 129; }), "n: 129 is not in [1, 128]");
  EXPECT_EQ(error([](auto& r) { r.n = 3, r.best_of = 2; }), "best_of: 2 is not in [3, 128]");
  EXPECT_EQ(error([](auto& r) { r.truncate_prompt = 0; }), "truncate_prompt: 0 is not at least 1");
  EXPECT_EQ(error([](auto& r) { r.prompt_logprobs = 21; }), "prompt_logprobs: 21 is not in [0, 20]");
  EXPECT_EQ(error([](auto& r) { r.logprob_token_ids = {258}; }), "logprob_token_ids: id 258 at index 0 is not in [0, 258)");
  EXPECT_EQ(error([](auto& r) { r.logprob_token_ids.assign(65, 1); }), "logprob_token_ids: has 65 ids; at most 64 are accepted");
  EXPECT_EQ(error([](auto& r) { r.sampling.bad_words = {"ok", ""}; }), "bad_words: word 1 has 0 bytes; 1 to 256 are accepted");
  EXPECT_EQ(error([](auto& r) { r.sampling.bad_words.assign(129, "x"); }), "bad_words: has 129 words; at most 128 are accepted");
  EXPECT_EQ(error([](auto& r) { r.sampling.bad_words = {"\xff"}; }), "bad_words: word 0 is not UTF-8");
  EXPECT_EQ(error([](auto& r) { r.speculation = SpeculationParams{.max_draft_tokens = 17}; }),
            "speculation.max_draft_tokens: 17 is not in [1, 16]");
  EXPECT_EQ(error([](auto& r) { r.speculation = SpeculationParams{.min_ngram = 5}; }),
            "speculation.max_ngram: 4 is not in [5, 16]");
}

}  // namespace
}  // namespace memserve::engine
