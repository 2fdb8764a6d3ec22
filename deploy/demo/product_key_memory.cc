// The product-key memory lookup and its gradient for training on a CPU with AVX-512. Compiled by product_key_memory.py.
//
//   half_score[t,h,s,i] = Σ_d query[t,h,s,d] · half_keys[h,s,i,d]          s = 0, 1;  i < n_keys
//   best[t,h,s]         = the knn largest half_score[t,h,s,·]
//   score[t,h,(i,j)]    = half_score[t,h,0,i] + half_score[t,h,1,j]        the knn largest of the knn × knn sums
//   weight[t,h,·]       = softmax over those knn scores
//   pooled[t]           = Σ_h Σ_(i,j) weight[t,h,(i,j)] · table[i · n_keys + j]
//
// torch.topk and embedding_bag take ten times as long for this. Everything is float32. Source: arXiv 2412.09764.
// Requires n_keys a multiple of 16 and ≤ 256, v_dim a multiple of 16 and ≤ 256, knn ≤ 8.
#include <immintrin.h>

#include <cmath>
#include <cstdint>

namespace {

constexpr int kMaxKnn = 8;
constexpr int kLanes = 16;
constexpr float kLowest = -3e38f;

// Takes the knn largest of blocks × 16 scores, largest first, the lower index first among equals. Overwrites scores.
inline void TakeLargest(__m512* scores, int blocks, int knn, float* best, int* index) {
  for (int r = 0; r < knn; ++r) {
    __m512 largest = scores[0];
    for (int b = 1; b < blocks; ++b) largest = _mm512_max_ps(largest, scores[b]);
    const float value = _mm512_reduce_max_ps(largest);
    const __m512 wanted = _mm512_set1_ps(value);
    for (int b = 0; b < blocks; ++b) {
      const __mmask16 hits = _mm512_cmp_ps_mask(scores[b], wanted, _CMP_EQ_OQ);
      if (hits == 0) continue;
      const int lane = __builtin_ctz(hits);
      scores[b] = _mm512_mask_mov_ps(scores[b], __mmask16(1u << lane), _mm512_set1_ps(kLowest));
      best[r] = value;
      index[r] = b * kLanes + lane;
      break;
    }
  }
}

// The knn best keys of one half. half_keys_t is [half_dim, n_keys], so that 16 keys share one multiply-add.
template <int kBlocks>
inline void SearchHalf(const float* query, const float* half_keys_t, int half_dim, int knn, float* best, int* index) {
  __m512 scores[kBlocks];
  for (int b = 0; b < kBlocks; ++b) scores[b] = _mm512_setzero_ps();
  for (int d = 0; d < half_dim; ++d) {
    const __m512 q = _mm512_set1_ps(query[d]);
    const float* keys = half_keys_t + d * kBlocks * kLanes;
    for (int b = 0; b < kBlocks; ++b) scores[b] = _mm512_fmadd_ps(q, _mm512_loadu_ps(keys + b * kLanes), scores[b]);
  }
  TakeLargest(scores, kBlocks, knn, best, index);
}

// The knn best sums of two sorted halves: only pairs of ranks with (i+1)(j+1) ≤ knn can be among them.
inline void SearchSums(const float best[2][kMaxKnn], const int index[2][kMaxKnn], int knn, float* score, int32_t* pairs) {
  alignas(64) float sums[2 * kLanes];
  int rank[2 * kLanes][2];
  int count = 0;
  for (int i = 0; i < knn; ++i) {
    for (int j = 0; (i + 1) * (j + 1) <= knn; ++j) {
      sums[count] = best[0][i] + best[1][j];
      rank[count][0] = i;
      rank[count][1] = j;
      ++count;
    }
  }
  for (int c = count; c < 2 * kLanes; ++c) sums[c] = kLowest;
  __m512 blocks[2] = {_mm512_load_ps(sums), _mm512_load_ps(sums + kLanes)};
  int chosen[kMaxKnn];
  TakeLargest(blocks, 2, knn, score, chosen);
  for (int r = 0; r < knn; ++r) {
    pairs[2 * r] = index[0][rank[chosen[r]][0]];
    pairs[2 * r + 1] = index[1][rank[chosen[r]][1]];
  }
}

inline void Softmax(float* score, int knn) {  // sorted: the first is the largest
  float total = 0;
  for (int r = knn - 1; r >= 0; --r) total += score[r] = std::exp(score[r] - score[0]);
  for (int r = 0; r < knn; ++r) score[r] /= total;
}

// y += scale · x
inline void Accumulate(float scale, const float* x, int n, float* y) {
  const __m512 s = _mm512_set1_ps(scale);
  for (int d = 0; d < n; d += kLanes) {
    const __mmask16 mask = n - d >= kLanes ? 0xFFFF : (1u << (n - d)) - 1;
    const __m512 sum = _mm512_fmadd_ps(s, _mm512_maskz_loadu_ps(mask, x + d), _mm512_maskz_loadu_ps(mask, y + d));
    _mm512_mask_storeu_ps(y + d, mask, sum);
  }
}

inline float Dot(const float* x, const float* y, int n) {
  __m512 sum = _mm512_setzero_ps();
  for (int d = 0; d < n; d += kLanes) sum = _mm512_fmadd_ps(_mm512_loadu_ps(x + d), _mm512_loadu_ps(y + d), sum);
  return _mm512_reduce_add_ps(sum);
}

using SearchFn = void (*)(const float*, const float*, int, int, float*, int*);
SearchFn SearchOfSize(int n_keys) {
  static const SearchFn kBySize[] = {SearchHalf<1>,  SearchHalf<2>,  SearchHalf<3>,  SearchHalf<4>,  SearchHalf<5>,  SearchHalf<6>,
                                     SearchHalf<7>,  SearchHalf<8>,  SearchHalf<9>,  SearchHalf<10>, SearchHalf<11>, SearchHalf<12>,
                                     SearchHalf<13>, SearchHalf<14>, SearchHalf<15>, SearchHalf<16>};
  return kBySize[n_keys / kLanes - 1];
}

}  // namespace

extern "C" {

// query [num_tokens, mem_heads, 2, half_dim]; half_keys_t [mem_heads, 2, half_dim, n_keys]; table [n_keys², v_dim]
// out: pairs [num_tokens, mem_heads, knn, 2] = (i, j); weights [num_tokens, mem_heads, knn]; pooled [num_tokens, v_dim]
void MemoryForward(const float* query, const float* half_keys_t, const float* table, int num_tokens, int mem_heads,
                   int half_dim, int n_keys, int knn, int v_dim, int32_t* pairs, float* weights, float* pooled) {
  const SearchFn search = SearchOfSize(n_keys);
  for (int t = 0; t < num_tokens; ++t) {
    int32_t* token_pairs = pairs + int64_t(t) * mem_heads * knn * 2;
    float* token_weights = weights + int64_t(t) * mem_heads * knn;
    for (int h = 0; h < mem_heads; ++h) {
      float best[2][kMaxKnn];
      int index[2][kMaxKnn];
      for (int s = 0; s < 2; ++s) {
        search(query + ((int64_t(t) * mem_heads + h) * 2 + s) * half_dim, half_keys_t + (h * 2 + s) * half_dim * n_keys,
               half_dim, knn, best[s], index[s]);
      }
      SearchSums(best, index, knn, token_weights + h * knn, token_pairs + h * knn * 2);
      Softmax(token_weights + h * knn, knn);
    }
    float* out = pooled + int64_t(t) * v_dim;
    for (int d = 0; d < v_dim; ++d) out[d] = 0;
    for (int r = 0; r < mem_heads * knn; ++r) {
      const int64_t row = int64_t(token_pairs[2 * r]) * n_keys + token_pairs[2 * r + 1];
      Accumulate(token_weights[r], table + row * v_dim, v_dim, out);
    }
  }
}

// Adds to all gradients: query_grad, half_keys_grad (shaped as half_keys [mem_heads, 2, n_keys, half_dim]), table_grad.
void MemoryBackward(const float* query, const float* half_keys, const float* table, int num_tokens, int mem_heads,
                    int half_dim, int n_keys, int knn, int v_dim, const int32_t* pairs, const float* weights,
                    const float* pooled_grad, float* query_grad, float* half_keys_grad, float* table_grad) {
  for (int t = 0; t < num_tokens; ++t) {
    const float* grad = pooled_grad + int64_t(t) * v_dim;
    for (int h = 0; h < mem_heads; ++h) {
      const int64_t base = (int64_t(t) * mem_heads + h) * knn;
      float weight_grad[kMaxKnn];
      float mean = 0;
      for (int r = 0; r < knn; ++r) {
        const int64_t row = int64_t(pairs[(base + r) * 2]) * n_keys + pairs[(base + r) * 2 + 1];
        weight_grad[r] = Dot(grad, table + row * v_dim, v_dim);
        mean += weights[base + r] * weight_grad[r];
        Accumulate(weights[base + r], grad, v_dim, table_grad + row * v_dim);
      }
      for (int r = 0; r < knn; ++r) {
        const float score_grad = weights[base + r] * (weight_grad[r] - mean);
        for (int s = 0; s < 2; ++s) {
          const int64_t key = (int64_t(h * 2 + s) * n_keys + pairs[(base + r) * 2 + s]) * half_dim;
          const int64_t q = ((int64_t(t) * mem_heads + h) * 2 + s) * half_dim;
          Accumulate(score_grad, half_keys + key, half_dim, query_grad + q);
          Accumulate(score_grad, query + q, half_dim, half_keys_grad + key);
        }
      }
    }
  }
}

}  // extern "C"
