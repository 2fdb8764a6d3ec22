// Rows of the token embedding, out[t, :] = weight[token of t, :] widened to float32.
//
// The token of t is token_ids[t], or, where from_slot[t] >= 0, sampled[from_slot[t]]: "what slot s of the last step sampled", so
// that a step can be launched before the last one was collected.
// Requires every token in [0, n); a violation is the caller's bug (the engine checks ids when a request arrives).
#pragma once

#include "kernels/tensor.h"
#include "kernels/weight_matrix.h"

namespace memserve::kernels {

struct EmbeddingArgs {
  TensorView<const int32_t, 1> token_ids;  // [num_tokens]
  TensorView<const int32_t, 1> from_slot;  // [num_tokens], -1 for token_ids
  TensorView<const int32_t, 1> sampled;    // [slots of the last step]; may be empty when no from_slot is used
  const WeightMatrix* weight = nullptr;    // n = vocab_size, k = dim
  TensorView<float, 2> out;                // out: [num_tokens, dim]
};

}  // namespace memserve::kernels
