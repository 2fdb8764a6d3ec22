#include "engine/scheduler.h"

#include <algorithm>

#include "kernels/check.h"

namespace memserve::engine {
namespace {

// Tokens whose values are known or will be when this step runs, and which are not planned yet.
int64_t Ready(const Sequence& sequence, int64_t step) {
  const int64_t known = std::min<int64_t>(static_cast<int64_t>(sequence.tokens.size()), sequence.most_tokens());
  const int64_t in_flight = sequence.last_draw_step == step - 1 && sequence.planned == static_cast<int64_t>(sequence.tokens.size()) ? 1 : 0;
  return std::min(known + in_flight, sequence.most_tokens()) - sequence.planned;
}

bool Decodes(const Sequence& sequence) { return !sequence.scores() && sequence.planned >= sequence.prompt_tokens; }

}  // namespace

void Scheduler::Add(std::shared_ptr<Sequence> sequence) {
  waiting_tokens_ += sequence->prompt_tokens;
  waiting_.push_back(std::move(sequence));
}

void Scheduler::Admit() {
  while (!waiting_.empty() && running() < options_.max_sequences) {
    const std::shared_ptr<Sequence>& next = waiting_.front();
    if (!cache_.Allocate(cache_.PagesFor(next->most_tokens()), &next->pages)) return;
    waiting_tokens_ -= next->prompt_tokens;
    running_.push_back(next);
    waiting_.pop_front();
  }
}

StepPlan Scheduler::Schedule(int64_t step, absl::Time now) {
  Admit();
  StepPlan plan;
  plan.batch.step = step;
  for (const std::shared_ptr<Sequence>& sequence : running_) {
    plan.batch.pages_per_sequence = std::max<int64_t>(plan.batch.pages_per_sequence, static_cast<int64_t>(sequence->pages.size()));
  }
  int64_t budget = options_.max_batch_tokens;
  for (const bool decodes : {true, false}) {
    for (const std::shared_ptr<Sequence>& sequence : running_) {
      if (budget == 0) break;
      // A sequence whose last prompt chunk is in this step is seen again by neither pass: the first pass goes before the second.
      if (Decodes(*sequence) != decodes) continue;
      const int64_t count = std::min(budget, Ready(*sequence, step));
      if (count <= 0) continue;
      PlanTokens(sequence, count, step, now, plan);
      budget -= count;
    }
  }
  // Slots that sample come first.
  std::vector<int32_t>& scored = plan.batch.logit_tokens;
  std::vector<int32_t> all;
  for (size_t i = 0; i < plan.sampled.size(); ++i) all.push_back(plan.sampled[i]->last_draw_slot);
  for (size_t i = 0; i < plan.sampled.size(); ++i) plan.sampled[i]->last_draw_slot = static_cast<int32_t>(i);
  all.insert(all.end(), scored.begin(), scored.end());
  plan.batch.logit_tokens = std::move(all);
  return plan;
}

// Puts the next `count` tokens of the sequence into the batch. Until Schedule has all slots, last_draw_slot holds the token's index in
// the batch and batch.logit_tokens those of scored slots only.
void Scheduler::PlanTokens(const std::shared_ptr<Sequence>& sequence, int64_t count, int64_t step, absl::Time now, StepPlan& plan) {
  Sequence& s = *sequence;
  Batch& batch = plan.batch;
  const auto row = static_cast<int32_t>(batch.num_sequences());
  batch.memory_knn.push_back(s.memory_knn);
  const size_t table = batch.block_tables.size();
  batch.block_tables.resize(table + batch.pages_per_sequence, -1);
  std::copy(s.pages.begin(), s.pages.end(), batch.block_tables.begin() + static_cast<int64_t>(table));
  if (s.planned == 0) s.first_step = now;

  for (int64_t i = 0; i < count; ++i) {
    const int64_t position = s.planned++;
    const bool known = position < static_cast<int64_t>(s.tokens.size());
    if (position < s.prompt_tokens) ++plan.prompt_tokens;
    batch.token_ids.push_back(known ? s.tokens[position] : 0);
    batch.from_slot.push_back(known ? -1 : s.last_draw_slot);
    batch.positions.push_back(static_cast<int32_t>(position));
    batch.sequence.push_back(row);
    batch.kv_slots.push_back(s.pages[position / cache_.page_size()] * cache_.page_size() + position % cache_.page_size());
    const auto token = static_cast<int32_t>(batch.num_tokens() - 1);
    if (s.scores() && position + 1 >= s.score_begin) {
      batch.logit_tokens.push_back(token);
      batch.score_targets.push_back(s.tokens[position + 1]);
      plan.scored.push_back(sequence);
    }
    if (!s.scores() && s.planned == s.prompt_tokens + s.draws_planned) {
      batch.sampling.push_back({.temperature = s.temperature,
                                .top_k = s.top_k,
                                .top_p = s.top_p,
                                .seed = s.seed,
                                .choice = 0,
                                .position = static_cast<uint32_t>(s.planned)});
      plan.sampled.push_back(sequence);
      ++s.draws_planned;
      s.last_draw_step = step;
      s.last_draw_slot = token;
    }
  }
}

void Scheduler::Remove(const std::shared_ptr<Sequence>& sequence) {
  RemoveIf([&](const std::shared_ptr<Sequence>& other) { return other == sequence; });
}

void Scheduler::RemoveIf(const std::function<bool(const std::shared_ptr<Sequence>&)>& visit) {
  std::erase_if(running_, [&](const std::shared_ptr<Sequence>& sequence) {
    if (!visit(sequence)) return false;
    sequence->ended = true;
    cache_.Release(&sequence->pages);
    return true;
  });
  std::erase_if(waiting_, [&](const std::shared_ptr<Sequence>& sequence) {
    if (!visit(sequence)) return false;
    sequence->ended = true;
    waiting_tokens_ -= sequence->prompt_tokens;
    return true;
  });
}

}  // namespace memserve::engine
