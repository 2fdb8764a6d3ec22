// The product-key memory lookup and its gradient for training on a CPU with AVX-512. Compiled by product_key_memory.py.
//
//   half_score[t,h,s,i] = Σ_d query[t,h,s,d] · half_keys[h,s,i,d]          s = 0, 1;  i < n_keys
//   best[t,h,s]         = the knn largest half_score[t,h,s,·]
//   score[t,h,(i,j)]    = half_score[t,h,0,i] + half_score[t,h,1,j]        the knn largest of the knn × knn sums
//   weight[t,h,·]       = softmax over those knn scores
//   pooled[t]           = Σ_h Σ_(i,j) weight[t,h,(i,j)] · table[i · n_keys + j]
//
// torch.topk and embedding_bag take ten times as long for this. Everything is float32. Source: arXiv 2412.09764.
// Requires n_keys a multiple of 16 and ≤ 256, v_dim a multiple of 64, half_dim ≤ 16, knn ≤ 8.
#include <immintrin.h>

#include <cmath>
#include <cstdint>

namespace {

constexpr int kMaxKnn = 8;
constexpr int kLanes = 16;
constexpr int kChunk = 64;  // values of a row summed at a time: one cache line each for four registers
constexpr float kLowest = -3e38f;
constexpr int kIndexBits = 8;

// Finds the knn largest of kBlocks × 16 scores, largest first, without a branch that depends on them: a score becomes an integer that sorts
// like it, its lowest bits give way to its index (lower index first), and every round takes the largest below the last one.
// Scores that agree in all but those bits (1 part in 30,000) count as equal.
template <int kBlocks>
inline void FindLargest(const __m512* scores, int knn, int* index) {
  const __m512i low_bits = _mm512_set1_epi32((1 << kIndexBits) - 1);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i lowest = _mm512_set1_epi32(INT32_MIN);
  __m512i sortable[kBlocks];
  for (int b = 0; b < kBlocks; ++b) {
    const __m512i bits = _mm512_castps_si512(scores[b]);
    const __m512i ordered = _mm512_xor_si512(bits, _mm512_srli_epi32(_mm512_srai_epi32(bits, 31), 1));
    const __m512i rank = _mm512_sub_epi32(low_bits, _mm512_add_epi32(lanes, _mm512_set1_epi32(b * kLanes)));
    sortable[b] = _mm512_or_si512(_mm512_andnot_si512(low_bits, ordered), rank);
  }
  __m512i last = _mm512_set1_epi32(INT32_MAX);
  for (int r = 0; r < knn; ++r) {
    __m512i largest = lowest;
    for (int b = 0; b < kBlocks; ++b) {
      largest = _mm512_mask_max_epi32(largest, _mm512_cmplt_epi32_mask(sortable[b], last), largest, sortable[b]);
    }
    const int found = _mm512_reduce_max_epi32(largest);
    index[r] = (1 << kIndexBits) - 1 - (found & ((1 << kIndexBits) - 1));
    last = _mm512_set1_epi32(found);
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
  alignas(64) float exact[kBlocks * kLanes];
  for (int b = 0; b < kBlocks; ++b) _mm512_store_ps(exact + b * kLanes, scores[b]);
  FindLargest<kBlocks>(scores, knn, index);
  for (int r = 0; r < knn; ++r) best[r] = exact[index[r]];
}

// The pairs of ranks that can be among the knn best sums of two sorted halves: (i+1)(j+1) ≤ knn.
struct Candidates {
  int count = 0;
  int i[2 * kLanes], j[2 * kLanes];
  explicit Candidates(int knn) {
    for (int a = 0; a < knn; ++a) {
      for (int b = 0; (a + 1) * (b + 1) <= knn; ++b, ++count) i[count] = a, j[count] = b;
    }
  }
};

inline void SearchSums(const Candidates& candidates, const float best[2][kMaxKnn], const int index[2][kMaxKnn], int knn, float* score,
                       int32_t* pairs) {
  alignas(64) float sums[2 * kLanes];
  for (int c = 0; c < 2 * kLanes; ++c) sums[c] = c < candidates.count ? best[0][candidates.i[c]] + best[1][candidates.j[c]] : kLowest;
  const __m512 blocks[2] = {_mm512_load_ps(sums), _mm512_load_ps(sums + kLanes)};
  int chosen[kMaxKnn];
  FindLargest<2>(blocks, knn, chosen);
  for (int r = 0; r < knn; ++r) {
    score[r] = sums[chosen[r]];
    pairs[2 * r] = index[0][candidates.i[chosen[r]]];
    pairs[2 * r + 1] = index[1][candidates.j[chosen[r]]];
  }
}

inline void Softmax(float* score, int knn) {
  float largest = score[0], total = 0;
  for (int r = 1; r < knn; ++r) largest = score[r] > largest ? score[r] : largest;
  for (int r = 0; r < knn; ++r) total += score[r] = std::exp(score[r] - largest);
  for (int r = 0; r < knn; ++r) score[r] /= total;
}

inline void PrefetchRow(const float* row, int v_dim) {
  for (int d = 0; d < v_dim; d += kLanes) _mm_prefetch(reinterpret_cast<const char*>(row + d), _MM_HINT_T0);
}

// y += scale · x
inline void Accumulate(__m512 scale, const float* x, int n, float* y) {
  for (int d = 0; d < n; d += kLanes) _mm512_storeu_ps(y + d, _mm512_fmadd_ps(scale, _mm512_loadu_ps(x + d), _mm512_loadu_ps(y + d)));
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
  const Candidates candidates(knn);
  const auto row_of = [&](const int32_t* pair) { return table + (int64_t(pair[0]) * n_keys + pair[1]) * v_dim; };
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
      SearchSums(candidates, best, index, knn, token_weights + h * knn, token_pairs + h * knn * 2);
      for (int r = 0; r < knn; ++r) PrefetchRow(row_of(token_pairs + (h * knn + r) * 2), v_dim);
      Softmax(token_weights + h * knn, knn);
    }
    for (int d = 0; d < v_dim; d += kChunk) {
      __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
      for (int r = 0; r < mem_heads * knn; ++r) {
        const float* row = row_of(token_pairs + 2 * r) + d;
        const __m512 weight = _mm512_set1_ps(token_weights[r]);
        for (int c = 0; c < 4; ++c) sum[c] = _mm512_fmadd_ps(weight, _mm512_loadu_ps(row + c * kLanes), sum[c]);
      }
      for (int c = 0; c < 4; ++c) _mm512_storeu_ps(pooled + int64_t(t) * v_dim + d + c * kLanes, sum[c]);
    }
  }
}

// Adds to all gradients: query_grad, half_keys_grad (shaped as half_keys [mem_heads, 2, n_keys, half_dim]), table_grad.
void MemoryBackward(const float* query, const float* half_keys, const float* table, int num_tokens, int mem_heads,
                    int half_dim, int n_keys, int knn, int v_dim, const int32_t* pairs, const float* weights,
                    const float* pooled_grad, float* query_grad, float* half_keys_grad, float* table_grad) {
  const auto row_offset = [&](int64_t entry) { return (int64_t(pairs[2 * entry]) * n_keys + pairs[2 * entry + 1]) * v_dim; };
  const __mmask16 half_mask = half_dim == kLanes ? 0xFFFF : (1u << half_dim) - 1;
  const int64_t num_entries = int64_t(num_tokens) * mem_heads * knn;
  const int ahead = 2 * mem_heads * knn;
  for (int t = 0; t < num_tokens; ++t) {
    const float* grad = pooled_grad + int64_t(t) * v_dim;
    for (int h = 0; h < mem_heads; ++h) {
      const int64_t base = (int64_t(t) * mem_heads + h) * knn;
      float weight_grad[kMaxKnn];
      float mean = 0;
      for (int r = 0; r < knn; ++r) {
        if (base + r + ahead < num_entries) {
          PrefetchRow(table + row_offset(base + r + ahead), v_dim);
          PrefetchRow(table_grad + row_offset(base + r + ahead), v_dim);
        }
        const int64_t row = row_offset(base + r);
        weight_grad[r] = Dot(grad, table + row, v_dim);
        mean += weights[base + r] * weight_grad[r];
        Accumulate(_mm512_set1_ps(weights[base + r]), grad, v_dim, table_grad + row);
      }
      for (int s = 0; s < 2; ++s) {
        const int64_t place = ((int64_t(t) * mem_heads + h) * 2 + s) * half_dim;
        const __m512 q = _mm512_maskz_loadu_ps(half_mask, query + place);
        __m512 q_grad = _mm512_maskz_loadu_ps(half_mask, query_grad + place);
        for (int r = 0; r < knn; ++r) {
          const __m512 score_grad = _mm512_set1_ps(weights[base + r] * (weight_grad[r] - mean));
          const int64_t key = (int64_t(h * 2 + s) * n_keys + pairs[(base + r) * 2 + s]) * half_dim;
          q_grad = _mm512_fmadd_ps(score_grad, _mm512_maskz_loadu_ps(half_mask, half_keys + key), q_grad);
          const __m512 key_grad = _mm512_maskz_loadu_ps(half_mask, half_keys_grad + key);
          _mm512_mask_storeu_ps(half_keys_grad + key, half_mask, _mm512_fmadd_ps(score_grad, q, key_grad));
        }
        _mm512_mask_storeu_ps(query_grad + place, half_mask, q_grad);
      }
    }
  }
}

}  // extern "C"
