#include "kernels/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/reference/reference.h"

namespace memserve::kernels::reference {
namespace {

// Pages are [slot, kv head, d].
int64_t Place(const KvPages& pages, int64_t slot, int64_t kv_head, int64_t d) {
  return (slot * pages.kv_heads + kv_head) * pages.head_dim + d;
}

// What is stored, as it reads.
double Stored(const KvPages& pages, const StoredValues& values, const float* scales, int64_t slot, int64_t kv_head, int64_t d) {
  const int64_t place = Place(pages, slot, kv_head, d);
  if (!pages.quantised()) return values.Get(place);
  return double{scales[pages.ScalePlace(slot, kv_head)]} * static_cast<const int8_t*>(values.data)[place];
}

// One token's keys or values of one head as codes and scale.
void Quantise(const KvPages& pages, void* codes, float* scales, int64_t slot, int64_t kv_head, const float* x) {
  float largest = 0;
  bool finite = true;
  for (int64_t d = 0; d < pages.head_dim; ++d) {
    finite = finite && std::isfinite(x[d]);
    largest = std::max(largest, std::abs(x[d]));
  }
  const float scale = largest / 127;
  const bool zero = !finite || scale < std::numeric_limits<float>::min();
  for (int64_t d = 0; d < pages.head_dim; ++d) {
    const float code = zero ? 0 : std::clamp(std::nearbyint(x[d] / scale), -127.0f, 127.0f);
    static_cast<int8_t*>(codes)[Place(pages, slot, kv_head, d)] = static_cast<int8_t>(code);
  }
  scales[pages.ScalePlace(slot, kv_head)] = !finite ? std::numeric_limits<float>::quiet_NaN() : zero ? 0 : scale;
}

int64_t SlotOf(const AttentionArgs& args, int64_t t, int64_t p) {
  const int64_t page_size = args.pages.page_size;
  MEMSERVE_CHECK(0 <= args.sequence(t) && args.sequence(t) < args.block_tables.dim(0));
  MEMSERVE_CHECK(p / page_size < args.block_tables.dim(1));
  const int64_t page = args.block_tables(args.sequence(t), p / page_size);
  MEMSERVE_CHECK(0 <= page && page < args.pages.num_pages);
  return page * page_size + p % page_size;
}

// out[t, h, :] for one token and head.
void Attend(const AttentionArgs& args, int64_t t, int64_t h) {
  const StoredValues keys{args.pages.keys, args.pages.dtype}, values{args.pages.values, args.pages.dtype};
  const int64_t head_dim = args.pages.head_dim;
  const int64_t kv = (args.first_query_head + h) / args.queries_per_kv - args.first_kv_head;
  MEMSERVE_CHECK(0 <= kv && kv < args.pages.kv_heads);
  const int64_t last = args.positions(t);
  const int64_t first = args.window > 0 ? std::max<int64_t>(0, last - args.window + 1) : 0;

  std::vector<double> weight;
  double largest = -std::numeric_limits<double>::infinity();
  for (int64_t p = first; p <= last; ++p) {
    const int64_t slot = SlotOf(args, t, p);
    double score = 0;
    for (int64_t d = 0; d < head_dim; ++d)
      score += double{args.q(t, h, d)} * Stored(args.pages, keys, args.pages.key_scales(), slot, kv, d);
    weight.push_back(score * args.scale);
    largest = std::max(largest, weight.back());
  }
  double total = 0;
  for (double& w : weight) total += w = std::exp(w - largest);
  for (int64_t d = 0; d < head_dim; ++d) {
    double sum = 0;
    for (int64_t p = first; p <= last; ++p) {
      sum += weight[p - first] * Stored(args.pages, values, args.pages.value_scales(), SlotOf(args, t, p), kv, d);
    }
    args.out(t, h, d) = sum / total;
  }
}

}  // namespace

void KvWrite(const KvWriteArgs& args) {
  const KvPages& pages = args.pages;
  const int64_t num_tokens = args.k.dim(0);
  MEMSERVE_CHECK(args.v.shape == args.k.shape);
  MEMSERVE_CHECK_EQ(args.k.dim(1), pages.kv_heads);
  MEMSERVE_CHECK_EQ(args.k.dim(2), pages.head_dim);
  MEMSERVE_CHECK_EQ(args.slots.dim(0), num_tokens);
  MEMSERVE_CHECK_EQ(pages.page_size % kAttentionBlock, 0);
  const StoredValues keys{pages.keys, pages.dtype}, values{pages.values, pages.dtype};
  for (int64_t t = 0; t < num_tokens; ++t) {
    const int64_t slot = args.slots(t);
    MEMSERVE_CHECK(0 <= slot && slot < pages.num_pages * pages.page_size);
    for (int64_t kv = 0; kv < pages.kv_heads; ++kv) {
      if (pages.quantised()) {
        Quantise(pages, pages.keys, pages.key_scales(), slot, kv, &args.k(t, kv, 0));
        Quantise(pages, pages.values, pages.value_scales(), slot, kv, &args.v(t, kv, 0));
        continue;
      }
      for (int64_t d = 0; d < pages.head_dim; ++d) {
        keys.Set(Place(pages, slot, kv, d), args.k(t, kv, d));
        values.Set(Place(pages, slot, kv, d), args.v(t, kv, d));
      }
    }
  }
}

void KvCopy(const KvCopyArgs& args) {
  const KvPages& pages = args.pages;
  for (int64_t i = 0; i < args.pages_from_to.dim(0); ++i) {
    const int64_t from = args.pages_from_to(i, 0), to = args.pages_from_to(i, 1);
    MEMSERVE_CHECK(0 <= from && from < pages.num_pages && 0 <= to && to < pages.num_pages && from != to);
    for (void* of : {pages.keys, pages.values}) {
      const StoredValues values{of, pages.dtype};
      if (pages.quantised()) {
        float* const scales = of == pages.keys ? pages.key_scales() : pages.value_scales();
        auto* const codes = static_cast<int8_t*>(of);
        std::copy_n(codes + from * pages.page_value_bytes(), pages.page_value_bytes(), codes + to * pages.page_value_bytes());
        std::copy_n(scales + from * pages.page_scales(), pages.page_scales(), scales + to * pages.page_scales());
        continue;
      }
      for (int64_t at = 0; at < pages.page_size; ++at) {
        for (int64_t kv = 0; kv < pages.kv_heads; ++kv) {
          for (int64_t d = 0; d < pages.head_dim; ++d) {
            values.Set(Place(pages, to * pages.page_size + at, kv, d),
                       values.Get(Place(pages, from * pages.page_size + at, kv, d)));
          }
        }
      }
    }
  }
}

void Attention(const AttentionArgs& args) {
  const int64_t num_tokens = args.q.dim(0), heads = args.q.dim(1);
  MEMSERVE_CHECK(args.out.shape == args.q.shape);
  MEMSERVE_CHECK_EQ(args.q.dim(2), args.pages.head_dim);
  MEMSERVE_CHECK_EQ(args.sequence.dim(0), num_tokens);
  MEMSERVE_CHECK_EQ(args.positions.dim(0), num_tokens);
  MEMSERVE_CHECK_EQ(args.pages.page_size % kAttentionBlock, 0);
  for (int64_t t = 0; t < num_tokens; ++t) {
    MEMSERVE_CHECK(args.positions(t) >= 0);
    for (int64_t h = 0; h < heads; ++h) Attend(args, t, h);
  }
}

}  // namespace memserve::kernels::reference
