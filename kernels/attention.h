// Causal attention over a paged KV cache, and the writes of keys and values into it.
//
//   slot(t)         = block_tables[sequence[t], position[t] / page_size] · page_size + position[t] mod page_size
//   score[t, h, p]  = scale · Σ_d q[t, h, d] · K[slot of p, kv(h), d]        p in (position[t] − window, position[t]]
//   out[t, h, :]    = Σ_p softmax_p(score[t, h, ·]) · V[slot of p, kv(h), :]
//   kv(h)           = (first_query_head + h) / queries_per_kv − first_kv_head           (grouped-query attention)
//
// Keys are taken in blocks of kAttentionBlock at absolute positions, ascending, with one update rule for decode, prefill and
// recompute; K and V are always read as stored (rounded), also those of the chunk being computed. A token's result depends on its
// own query and the stored keys and values alone: not on the batch, the chunking or the threads.
//
// int8 pages: a token's head_dim keys (or values) of one KV head are kept as codes with a scale of their own,
//
//   scale = max |x| / 127        code = x / scale, to the nearest whole number, halves to even, in [−127, 127]        x ≈ code ·
//   scale
//
// in float32. A scale below the smallest normal number is 0, and so are its codes; a vector with an element that is not finite has
// the scale NaN: what reads it is NaN. Source: FlashAttention's online softmax (arXiv 2205.14135), PagedAttention (arXiv
// 2309.06180).
#pragma once

#include <cstdint>

#include "kernels/tensor.h"

namespace memserve::kernels {

inline constexpr int64_t kAttentionBlock = 16;  // keys; page sizes are multiples of it

// The pages of one layer's keys and values. Memory is the back end's, in a layout of its own; a page holds page_size tokens.
struct KvPages {
  void* keys = nullptr;
  void* values = nullptr;
  DType dtype = DType::kF32;  // f32, bf16 or int8
  int64_t num_pages = 0;
  int64_t page_size = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;

  // Bytes of keys (and as many of values): page_bytes_each() for each page.
  int64_t bytes_each() const { return num_pages * page_bytes_each(); }
  int64_t page_bytes_each() const {
    return page_value_bytes() + (quantised() ? page_scales() * static_cast<int64_t>(sizeof(float)) : 0);
  }
  int64_t page_value_bytes() const { return page_size * kv_heads * head_dim * SizeOf(dtype); }
  int64_t page_scales() const { return page_size * kv_heads; }

  // int8 has a scale for each token and KV head, float [num_pages, kv_heads, page_size], behind the codes of all pages.
  bool quantised() const { return dtype == DType::kI8; }
  float* key_scales() const { return ScalesOf(keys); }
  float* value_scales() const { return ScalesOf(values); }
  int64_t ScalePlace(int64_t slot, int64_t kv_head) const {
    return (slot / page_size * kv_heads + kv_head) * page_size + slot % page_size;
  }

  float* ScalesOf(void* codes) const {
    return reinterpret_cast<float*>(static_cast<char*>(codes) + num_pages * page_size * kv_heads * head_dim);
  }
};

struct KvWriteArgs {
  TensorView<const float, 3> k;        // [num_tokens, kv_heads, head_dim], after rotary
  TensorView<const float, 3> v;        // [num_tokens, kv_heads, head_dim]
  TensorView<const int64_t, 1> slots;  // [num_tokens], distinct: page · page_size + place in it
  KvPages pages;
};

// Copies whole pages, keys and values: page [i, 0] to page [i, 1]. A page is copied to once, and then not from.
struct KvCopyArgs {
  TensorView<const int32_t, 2> pages_from_to;  // [copies, 2]
  KvPages pages;
};

struct AttentionArgs {
  TensorView<const float, 3> q;               // [num_tokens, heads, head_dim], after rotary
  TensorView<const int32_t, 1> sequence;      // [num_tokens], row of block_tables
  TensorView<const int32_t, 1> positions;     // [num_tokens]
  TensorView<const int32_t, 2> block_tables;  // [num_sequences, most pages], -1 beyond the sequence's end
  KvPages pages;
  int64_t queries_per_kv = 1;
  int64_t first_query_head = 0;  // of this rank, in the whole model
  int64_t first_kv_head = 0;
  float scale = 1.0f;
  int64_t window = 0;        // 0: no sliding window
  TensorView<float, 3> out;  // out: [num_tokens, heads, head_dim]
};

}  // namespace memserve::kernels
