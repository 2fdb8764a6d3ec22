// The operations as compiled for one instruction set. A back end chooses its set once, when it is made.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/attention.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/cpu/weight_matrix.h"
#include "kernels/embedding.h"
#include "kernels/embedding_bag.h"
#include "kernels/found_rows.h"
#include "kernels/gates.h"
#include "kernels/layer_norm.h"
#include "kernels/logit_adjustment.h"
#include "kernels/matmul.h"
#include "kernels/product_key_search.h"
#include "kernels/rms_norm.h"
#include "kernels/rope.h"
#include "kernels/row_dot.h"
#include "kernels/sampling.h"

namespace memserve::kernels::cpu {

class HostRowStore;

// Memory that an operation needs while it runs. It grows to the largest call and stays: a steady step allocates nothing.
class Scratch {
 public:
  template <typename T>
  T* Get(int64_t count) {
    const size_t bytes = count * sizeof(T) + 64;
    if (bytes > bytes_) {
      block_.reset();
      block_.reset(static_cast<std::byte*>(::operator new (bytes, std::align_val_t{64})));
      bytes_ = bytes;
    }
    return reinterpret_cast<T*>(block_.get());
  }

 private:
  struct Free {
    void operator()(std::byte* block) const { ::operator delete (block, std::align_val_t{64}); }
  };
  std::unique_ptr<std::byte, Free> block_;
  size_t bytes_ = 0;
};

// The pairs of ranks (i, j) that can be among the `keep` best sums: (i + 1)(j + 1) <= keep, in the order of i, then j.
struct Staircase {
  std::vector<int32_t> columns;  // [keep], of each i
  std::vector<int32_t> i, j;     // of each pair
  std::vector<int32_t> corners;  // pairs (i, j) with (i + 1)(j + 1) = keep: the last of `keep` that all reach its sum
};

// What the operations of one back end share.
struct Context {
  explicit Context(int threads) : pool(threads), of_thread(pool.size()) {}

  ThreadPool pool;
  Scratch shared;
  Scratch rounded;  // activations as the weights want them
  std::vector<Scratch> of_thread;
  std::vector<std::unique_ptr<const Staircase>> staircases;  // by keep; made at first use
};

struct Functions {
  void (*rms_norm)(Context&, const RmsNormArgs&);
  void (*layer_norm)(Context&, const LayerNormArgs&);
  void (*rope)(Context&, const RopeArgs&);
  void (*silu_product)(Context&, const SiluProductArgs&);
  void (*sigmoid_gate)(Context&, const SigmoidGateArgs&);
  void (*mat_mul)(Context&, const PackedMatrix&, const MatMulArgs&);
  void (*kv_write)(Context&, const KvWriteArgs&);
  void (*attention)(Context&, const AttentionArgs&);
  void (*product_key_search)(Context&, const PackedMatrix&, const ProductKeySearchArgs&);
  void (*embedding_bag)(Context&, const HostRowStore&, const EmbeddingBagArgs&);
  void (*row_dot)(Context&, const HostRowStore&, const RowDotArgs&);
  void (*sample)(Context&, const SampleArgs&);
  void (*token_logprob)(Context&, const TokenLogprobArgs&);
  void (*top_logprobs)(Context&, const TopLogprobsArgs&);
};

// Plain code for all instruction sets: few slots want it, or it waits for memory.
void AdjustLogits(Context& context, const AdjustLogitsArgs& args);
void MaskRows(Context& context, const MaskRowsArgs& args);
void SelectBags(const SelectBagsArgs& args);
void CountRows(const CountRowsArgs& args);

// Each unit fills in its own; `index` is that of the instruction set in the dispatch tables.
void AddElementwise(size_t index, Functions& functions);
void AddMatMul(size_t index, Functions& functions);
void AddAttention(size_t index, Functions& functions);
void AddProductKeySearch(size_t index, Functions& functions);
void AddEmbeddingBag(size_t index, Functions& functions);
void AddSampling(size_t index, Functions& functions);

}  // namespace memserve::kernels::cpu
