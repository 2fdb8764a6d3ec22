// What a request changes about the logits before a token is drawn. Applied in this order, each step to what the last one left:
//
//   repetition   for each token seen: logit > 0 ? logit / penalty : logit · penalty        (CTRL, arXiv 1909.05858)
//   counts       logit −= frequency_penalty · count + presence_penalty · [count > 0]       count: how often it was drawn
//   bias         logit += value for each listed token; −inf bans it
//   mask         −inf where the token's bit is 0
//   min_p        −inf where p < min_p · the largest p,         p = softmax(logits / temperature)
//   typical_p    −inf for all but the shortest list, by rising |−log p − entropy| (ties: lower id), whose mass reaches typical_p
//                                                              (Locally Typical Sampling, arXiv 2202.00666)
//
// The last two leave at least one token. NaN counts as −inf. Steps that change nothing (penalty 1 or 0, no list, min_p 0, typical_p 1)
// leave the bits alone. With temperature 0 (greedy) min_p and typical_p are left out: they would not change the choice.
// Requires agreeing shapes and ranges within their lists, tokens in [0, vocab_size); a violation is the caller's bug.
#pragma once

#include <cstdint>

#include "kernels/tensor.h"

namespace memserve::kernels {

// Of one slot. Plain data, copied to the device with the batch.
struct LogitAdjustment {
  float repetition_penalty = 1.0f;  // > 0
  float frequency_penalty = 0.0f;
  float presence_penalty = 0.0f;
  float min_p = 0.0f;
  float typical_p = 1.0f;
  float temperature = 0.0f;
  int32_t seen_begin = 0, seen_end = 0;  // in seen_tokens and seen_counts: tokens of the prompt (count 0) and those drawn
  int32_t bias_begin = 0, bias_end = 0;  // in bias_tokens and bias_values
  int32_t mask_row = -1;                 // of masks; -1: none
};

struct AdjustLogitsArgs {
  TensorView<const float, 2> logits;                 // [slots, vocab_size]
  TensorView<const LogitAdjustment, 1> adjustments;  // [slots]
  TensorView<const int32_t, 1> seen_tokens;          // each once in a slot's range
  TensorView<const int32_t, 1> seen_counts;
  TensorView<const int32_t, 1> bias_tokens;
  TensorView<const float, 1> bias_values;
  TensorView<const uint32_t, 2> masks;               // [rows, ⌈vocab_size / 32⌉]: bit id % 32 of word id / 32
  TensorView<float, 2> out;                          // out: [slots, vocab_size]; may be logits itself
};

// The largest logits of each slot and their log-probabilities, largest first, ties: lower id first; and those of chosen tokens.
// Slots want different numbers. log p = logit − log Σ exp(logits), NaN as −inf; the bits are those of Sample and TokenLogprob.
struct TopLogprobsArgs {
  TensorView<const float, 2> logits;      // [slots, vocab_size]
  TensorView<const int32_t, 1> counts;    // [slots], each in [0, columns of tokens] and at most vocab_size
  TensorView<int32_t, 2> tokens;          // out: [slots, most]; -1 beyond a slot's count
  TensorView<float, 2> logprobs;          // out: [slots, most]; 0 there
  TensorView<const int32_t, 2> chosen;    // optional: [slots, chosen], each in [0, vocab_size), or -1
  TensorView<float, 2> chosen_logprobs;   // out, beside chosen; 0 where it is -1
};

}  // namespace memserve::kernels
