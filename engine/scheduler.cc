#include "engine/scheduler.h"

#include <algorithm>
#include <utility>

#include "kernels/check.h"

namespace memserve::engine {
namespace {

int64_t Known(const Sequence& sequence) {
  return std::min<int64_t>(static_cast<int64_t>(sequence.tokens.size()), sequence.most_tokens());
}

// Tokens whose values are known or will be when this step runs, and which are not planned yet.
int64_t Ready(const Sequence& sequence, int64_t step) {
  // What was drawn last may change the logits of the next draw, or be what guesses follow: then it must be known.
  const int64_t in_flight = sequence.rules == nullptr && !sequence.drafts && sequence.last_draw_step == step - 1 &&
                                    sequence.planned == static_cast<int64_t>(sequence.tokens.size())
                                ? 1
                                : 0;
  return std::min(Known(sequence) + in_flight, sequence.most_tokens()) - sequence.planned;
}

// Whether the sequence adds just what it drew last; else it computes a prompt, for the first time or again.
bool Decodes(const Sequence& sequence) { return !sequence.scores() && sequence.planned >= sequence.prompt_tokens + sequence.draws_planned - 1; }

bool GoesBefore(const Sequence& a, const Sequence& b) { return a.priority != b.priority ? a.priority > b.priority : a.order < b.order; }

void Insert(std::list<std::shared_ptr<Sequence>>& queue, std::shared_ptr<Sequence> sequence) {
  auto place = queue.end();
  while (place != queue.begin() && GoesBefore(*sequence, **std::prev(place))) --place;
  queue.insert(place, std::move(sequence));
}

bool WaitsForLeader(const Sequence& sequence) {
  const Sequence* leader = sequence.leader.get();
  return leader != nullptr && !leader->ended && leader->planned < leader->shared_tokens();
}

// The adjustment of one slot. Its guesses count as drawn for it alone.
void AdjustLogits(const StepPlan::Draw& draw, Batch& batch) {
  Sequence& s = *draw.sequence;
  const auto known = static_cast<int64_t>(s.tokens.size());
  s.tokens.insert(s.tokens.end(), s.guessed.begin(), s.guessed.begin() + draw.guesses);
  s.rules->AddTo(batch, s.tokens, s.prompt_tokens);
  s.rules->TakeBack(s.tokens, known, s.prompt_tokens);
  s.tokens.resize(known);
}

}  // namespace

void Scheduler::Add(std::shared_ptr<Sequence> sequence) {
  sequence->order = next_order_++;
  Wait(std::move(sequence));
}

void Scheduler::Wait(std::shared_ptr<Sequence> sequence) {
  sequence->waits_with =
      static_cast<int64_t>(sequence->tokens.size()) - (sequence->leader != nullptr ? sequence->leader->shared_tokens() : 0);
  waiting_tokens_ += sequence->waits_with;
  Insert(waiting_, std::move(sequence));
}

// Pages for what is known of the sequence: what the cache has, and new ones for the rest. Where others run, a page for each of them is
// left, so that what is taken up is not given up at once.
bool Scheduler::TakeUp(const std::shared_ptr<Sequence>& sequence) {
  Sequence& s = *sequence;
  const int64_t needed = cache_.PagesFor(Known(s));
  const int64_t found = s.chain.root == nullptr ? 0 : cache_.TakePrefix(s.tokens, s.cacheable_tokens() / cache_.page_size(), &s.chain, &s.pages);
  if (needed - found + running() > cache_.available() || !cache_.Allocate(needed - found, &s.pages)) {
    cache_.Release(&s.pages);
    s.chain = {.root = s.chain.root};
    return false;
  }
  s.planned = found * cache_.page_size();
  if (s.leader != nullptr && Fork(s)) s.planned = s.leader->shared_tokens();
  if (s.preemptions == 0) s.cached_tokens = s.planned;
  s.leader = nullptr;
  waiting_tokens_ -= s.waits_with;
  preempted_ -= s.preemptions > 0 ? 1 : 0;
  return true;
}

// The page that the leader's prompt ends in is copied: from there on the two differ. All pages before it are shared.
bool Scheduler::Fork(Sequence& s) {
  const Sequence& leader = *s.leader;
  const int64_t shared = leader.shared_tokens(), page = shared / cache_.page_size();
  const bool has = !leader.ended && leader.planned >= shared && page < static_cast<int64_t>(leader.pages.size());
  if (!has || s.planned != page * cache_.page_size() || shared % cache_.page_size() == 0 || s.cacheable_tokens() < shared ||
      static_cast<int64_t>(page_copies_.size()) >= 2 * options_.max_sequences ||
      !std::equal(s.tokens.begin() + s.planned, s.tokens.begin() + shared, leader.tokens.begin() + s.planned)) {
    return false;
  }
  page_copies_.insert(page_copies_.end(), {leader.pages[page], s.pages[page]});
  return true;
}

void Scheduler::Admit() {
  for (auto next = waiting_.begin(); next != waiting_.end();) {
    if (WaitsForLeader(**next)) {
      ++next;
      continue;
    }
    // Who comes later does not overtake who does not fit: he would never fit. A lower priority makes room.
    while (running() >= options_.max_sequences || !TakeUp(*next)) {
      if (running_.empty() || running_.back()->priority >= (*next)->priority) return;
      Preempt(std::prev(running_.end()));
    }
    const std::shared_ptr<Sequence> taken = std::move(*next);
    next = waiting_.erase(next);
    Insert(running_, taken);
  }
}

// A sequence gives its pages back and waits. What it published stays in the cache as long as there is room.
void Scheduler::Preempt(Queue::iterator victim) {
  const std::shared_ptr<Sequence> sequence = std::move(*victim);
  running_.erase(victim);
  Sequence& s = *sequence;
  cache_.Release(&s.pages);
  s.chain = {.root = s.chain.root};
  s.planned = 0;
  ++s.preemptions;
  ++preemptions_;
  ++preempted_;
  Wait(sequence);
}

// Whether the sequence has, or can be given, a page for its next token. Others that come after it make room; false: it is last itself.
bool Scheduler::FindPageFor(const Sequence& sequence) {
  if (sequence.planned < static_cast<int64_t>(sequence.pages.size()) * cache_.page_size()) return true;
  while (cache_.available() == 0) {
    if (running_.back().get() == &sequence) return false;
    Preempt(std::prev(running_.end()));
  }
  return true;
}

// Guesses what follows the last token, as far as there are pages that nobody else will need for his next token.
void Scheduler::Guess(Sequence& s, int64_t most) {
  most = std::min(most, s.prompt_tokens + s.max_draws - 1 - static_cast<int64_t>(s.tokens.size()));
  s.guessed = s.drafts->Guess(s.tokens, most);
  s.accepted = 0;
  s.guessed_at = s.preemptions;
  const auto room = [&] { return static_cast<int64_t>(s.pages.size()) * cache_.page_size() - s.planned - 1; };
  while (room() < static_cast<int64_t>(s.guessed.size()) && cache_.available() > running())
    MEMSERVE_CHECK(cache_.Allocate(1, &s.pages));
  if (room() < static_cast<int64_t>(s.guessed.size())) s.guessed.resize(room());
}

StepPlan Scheduler::Schedule(int64_t step, absl::Time now, const StepTimes& times) {
  Admit();
  StepPlan plan;
  plan.batch.step = step;
  plan.batch.page_copies = std::exchange(page_copies_, {});
  std::vector<Planned> planned;
  int64_t budget = options_.max_batch_tokens;
  int64_t guesses = options_.max_sequences - running();  // a step has so many slots that draw
  for (auto next = running_.begin(); next != running_.end() && budget > 0;) {
    const std::shared_ptr<Sequence> sequence = *next;
    if (!Decodes(*sequence) || Ready(*sequence, step) <= 0) {
      ++next;
      continue;
    }
    if (!FindPageFor(*sequence)) {
      // The last one: nobody comes after it.
      Preempt(next);
      break;
    }
    ++next;  // only now: those that made room came after it
    if (sequence->planned == static_cast<int64_t>(sequence->pages.size()) * cache_.page_size()) {
      MEMSERVE_CHECK(cache_.Allocate(1, &sequence->pages));
    }
    if (sequence->drafts) Guess(*sequence, std::min(budget - 1, guesses));
    planned.push_back({sequence, 1 + static_cast<int64_t>(sequence->guessed.size())});
    plan.work.Add(sequence->planned, planned.back().count);
    guesses -= planned.back().count - 1;
    budget -= planned.back().count;
  }
  const StepWork decodes = plan.work;
  for (const std::shared_ptr<Sequence>& sequence : running_) {
    if (budget == 0) break;
    if (Decodes(*sequence)) continue;
    // A token that came while it waited may have no page yet; it is decoded then.
    const int64_t room = static_cast<int64_t>(sequence->pages.size()) * cache_.page_size() - sequence->planned;
    int64_t count = std::min({budget, Ready(*sequence, step), room});
    if (count <= 0) continue;
    if (decodes.tokens > 0) {
      const int64_t least = plan.work.tokens == decodes.tokens ? 1 : 0;  // prompts go on, however slow
      count = std::min(count, std::max(least, times.PrefillLimit(decodes, plan.work, sequence->planned)));
      if (count == 0) break;
    }
    plan.work.Add(sequence->planned, count);
    planned.push_back({sequence, count});
    budget -= count;
  }
  for (const Planned& p : planned) {
    plan.batch.pages_per_sequence = std::max<int64_t>(plan.batch.pages_per_sequence, static_cast<int64_t>(p.sequence->pages.size()));
  }
  plan.only_decodes = plan.work.tokens == decodes.tokens;
  for (const Planned& p : planned) PlanTokens(p, step, now, plan);

  OrderSlots(plan);
  return plan;
}

// Slots that sample come first, and of them those whose logits are adjusted. Until here batch.logit_tokens has those of scored
// slots only.
void Scheduler::OrderSlots(StepPlan& plan) {
  Batch& batch = plan.batch;
  std::stable_partition(plan.sampled.begin(), plan.sampled.end(),
                        [&](const StepPlan::Draw& draw) { return draw.sequence->rules != nullptr; });
  std::vector<int32_t> logit_tokens;
  for (const StepPlan::Draw& draw : plan.sampled) {
    Sequence& s = *draw.sequence;
    s.last_draw_slot = static_cast<int32_t>(logit_tokens.size());
    logit_tokens.push_back(draw.token);
    batch.sampling.push_back({.temperature = s.temperature,
                              .top_k = s.top_k,
                              .top_p = s.top_p,
                              .seed = s.seed,
                              .choice = static_cast<uint32_t>(s.choice),
                              .position = static_cast<uint32_t>(batch.positions[draw.token] + 1)});
    if (s.rules != nullptr) AdjustLogits(draw, batch);
    batch.top_logprobs.push_back(s.top_logprobs);
    batch.most_chosen = std::max(batch.most_chosen, static_cast<int64_t>(s.chosen_logprobs.size()));
  }
  for (const StepPlan::Draw& draw : plan.sampled) {
    const std::vector<int32_t>& chosen = draw.sequence->chosen_logprobs;
    batch.chosen_tokens.insert(batch.chosen_tokens.end(), chosen.begin(), chosen.end());
    batch.chosen_tokens.resize(batch.chosen_tokens.size() + batch.most_chosen - chosen.size(), -1);
  }
  for (const std::shared_ptr<Sequence>& sequence : plan.scored)
    batch.top_logprobs.push_back(std::max(0, sequence->prompt_top_logprobs));
  if (batch.most_chosen == 0 &&
      std::all_of(batch.top_logprobs.begin(), batch.top_logprobs.end(), [](int32_t count) { return count == 0; }))
    batch.top_logprobs.clear();
  logit_tokens.insert(logit_tokens.end(), batch.logit_tokens.begin(), batch.logit_tokens.end());
  batch.logit_tokens = std::move(logit_tokens);
}

// Puts the next tokens of the sequence into the batch.
void Scheduler::PlanTokens(const Planned& planned, int64_t step, absl::Time now, StepPlan& plan) {
  Sequence& s = *planned.sequence;
  Batch& batch = plan.batch;
  const auto row = static_cast<int32_t>(batch.num_sequences());
  s.memory.AddTo(batch);
  const size_t table = batch.block_tables.size();
  batch.block_tables.resize(table + batch.pages_per_sequence, -1);
  std::copy(s.pages.begin(), s.pages.end(), batch.block_tables.begin() + static_cast<int64_t>(table));
  if (s.first_step == absl::InfiniteFuture()) s.first_step = now;

  for (int64_t i = 0; i < planned.count; ++i) {
    const int64_t position = s.planned++;
    const int64_t beyond = position - static_cast<int64_t>(s.tokens.size());
    const bool guessed = beyond >= 0 && beyond < static_cast<int64_t>(s.guessed.size());
    if (position < s.prompt_tokens) ++plan.prompt_tokens;
    batch.token_ids.push_back(beyond < 0 ? s.tokens[position] : guessed ? s.guessed[beyond] : 0);
    batch.from_slot.push_back(beyond < 0 || guessed ? -1 : s.last_draw_slot);
    batch.positions.push_back(static_cast<int32_t>(position));
    batch.sequence.push_back(row);
    batch.kv_slots.push_back(s.pages[position / cache_.page_size()] * cache_.page_size() + position % cache_.page_size());
    const auto token = static_cast<int32_t>(batch.num_tokens() - 1);
    if (s.trace.Wants(position)) {
      batch.traced_tokens.push_back(token);
      plan.traced.push_back({planned.sequence, position});
    }
    if (s.score_begin > 0 && position + 1 >= s.score_begin + s.scored_planned && position + 1 < s.score_end) {
      batch.logit_tokens.push_back(token);
      batch.score_targets.push_back(s.tokens[position + 1]);
      plan.scored.push_back(planned.sequence);
      ++s.scored_planned;
    }
    if (!s.scores() && s.planned == s.prompt_tokens + s.draws_planned) {
      plan.sampled.push_back({planned.sequence, token, guessed ? static_cast<int32_t>(beyond + 1) : 0});
      ++s.draws_planned;
      s.last_draw_step = step;
    }
  }
  PublishPages(s);
}

// Pages that this step fills: a step that reads them for another sequence comes later in the same stream.
void Scheduler::PublishPages(Sequence& s) {
  if (s.chain.root == nullptr) return;
  const int64_t size = cache_.page_size();
  const int64_t filled = std::min(s.planned, static_cast<int64_t>(s.tokens.size()));
  while ((s.chain.length + 1) * size <= filled) {
    const int64_t page = s.chain.length;
    cache_.Publish(s.pages[page], absl::MakeConstSpan(s.tokens).subspan(page * size, size), &s.chain);
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
    waiting_tokens_ -= sequence->waits_with;
    preempted_ -= sequence->preemptions > 0 ? 1 : 0;
    return true;
  });
}

}  // namespace memserve::engine
