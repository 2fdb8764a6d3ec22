// From logits to tokens, and log-probabilities.
#pragma once

#include <cstdint>

#include "kernels/tensor.h"

namespace memserve::kernels {

// How one slot of a step samples. Plain data, copied to the device with the batch.
struct SamplingSlot {
  float temperature = 0.0f;  // 0: greedy, the lowest id among equal logits
  int32_t top_k = 0;         // 0: all
  float top_p = 1.0f;        // 1: all
  uint64_t seed = 0;
  uint32_t choice = 0;       // index among the n choices of a request
  uint32_t position = 0;     // of the token that is drawn, in its sequence
};

// Draws one token for each row of logits.
//
//   greedy:  argmax, lowest id first among equals; also where the largest logit is infinite, so that there is no distribution
//   else     p = softmax(logits / temperature) in double, over the top_k largest (ties: lower id first), cut to the shortest prefix
//            (largest first, at least one) whose mass reaches top_p; the token is where u · mass falls in that order (in id order
//            when top_k is 0 or at least vocab_size and top_p at least 1), never one of no mass
//   u        = Uniform(seed, choice, position), see random.h: nothing else, so a draw depends on the slot alone
//
// logprobs[s] = log softmax(logits[s])[token], of the plain logits: before temperature and cuts. NaN logits count as −inf.
struct SampleArgs {
  TensorView<const float, 2> logits;          // [slots, vocab_size]
  TensorView<const SamplingSlot, 1> slots;    // [slots]
  TensorView<int32_t, 1> tokens;              // out: [slots]
  TensorView<float, 1> logprobs;              // out: [slots]
};

// Scores given tokens: logprobs[s] = log softmax(logits[s])[targets[s]], is_greedy[s] = 1 if no other logit is larger and no lower
// id has an equal one.
struct TokenLogprobArgs {
  TensorView<const float, 2> logits;      // [slots, vocab_size]
  TensorView<const int32_t, 1> targets;   // [slots], each in [0, vocab_size), or -1: logprob 0, not greedy
  TensorView<float, 1> logprobs;          // out: [slots]
  TensorView<int32_t, 1> is_greedy;       // out: [slots]
};

// Picks rows: out[s, :] = x[rows[s], :]. The tokens of a batch that want logits.
struct SelectRowsArgs {
  TensorView<const float, 2> x;           // [num_tokens, dim]
  TensorView<const int32_t, 1> rows;      // [slots]
  TensorView<float, 2> out;               // out: [slots, dim]
};

}  // namespace memserve::kernels
