// Finds, for every token and memory head, the knn rows of the value table whose product keys answer the query best.
//
//   half_score[t,h,s,i] = Σ_d query[t,h,s,d] · half_keys[h,s,i,d]          s = 0, 1;  i < n_keys; one fma chain, d ascending
//   best[t,h,s]         = the knn largest half_score[t,h,s,·]
//   score[t,h,(i,j)]    = half_score[t,h,0,i] + half_score[t,h,1,j]        i ∈ best[t,h,0], j ∈ best[t,h,1]
//   row(i,j)            = i · n_keys + j
//   weight[t,h,·]       = softmax over the scores kept, float32, per head
//
// Keeps the knn largest scores, largest first. Ties: the lower i within a half; among the sums the lower rank i, then rank j
// (ranks in the sorted halves). Only pairs of ranks with (i+1)(j+1) <= knn can be among the knn best: 119 for knn 32.
// NaN scores (from NaN weights) rank last. Queries are rounded to half_keys' activation type first.
// knn_of_token[t], if given, keeps only that many for token t: the halves' best min(knn, ·), the softmax over those; entries beyond
// have row -1, score and weight 0. 0 keeps none: the memory of that token is off.
// Source: Memory Layers at Scale (arXiv 2412.09764), product-key lookup; Large Memory Layers with Product Keys (arXiv 1907.05242).
// Requires agreeing shapes and 1 <= knn <= n_keys <= 46340 (rows fit int32); a violation is the caller's bug. Zero tokens is fine.
#pragma once

#include "kernels/tensor.h"
#include "kernels/weight_matrix.h"

namespace memserve::kernels {

struct ProductKeySearchArgs {
  TensorView<const float, 4> query;           // [num_tokens, mem_heads, 2, half_dim]
  const WeightMatrix* half_keys = nullptr;    // groups mem_heads * 2 (h major), n = n_keys, k = half_dim
  TensorView<const int32_t, 1> knn_of_token;  // optional: [num_tokens], each in [0, knn]
  TensorView<float, 3> scores;                // out: [num_tokens, mem_heads, knn]
  TensorView<float, 3> weights;               // out: [num_tokens, mem_heads, knn]
  TensorView<int32_t, 3> rows;                // out: [num_tokens, mem_heads, knn], each in [-1, n_keys²)
};

}  // namespace memserve::kernels
