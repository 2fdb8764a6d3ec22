// Which part of a model one rank holds, and what the layers need while they run.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/model/config.h"
#include "engine/model/weights.h"
#include "kernels/backend.h"
#include "kernels/collective.h"

namespace memserve::engine {

// Tensor parallelism: query heads (with the KV heads they need), feed-forward columns, value table columns and vocabulary rows are
// split over the ranks; norms, memory queries and half keys are replicated.
struct Shard {
  int rank = 0;
  int ranks = 1;

  Range Heads(const ModelConfig& config) const { return PartOf(config.n_heads, 1, rank, ranks); }
  Range KvHeads(const ModelConfig& config) const {
    const int64_t group = config.n_heads / config.n_kv_heads;
    const Range heads = Heads(config);
    return {heads.begin / group, (heads.end + group - 1) / group};
  }
  Range FeedForward(const ModelConfig& config) const { return PartOf(config.ffn_dim, 16, rank, ranks); }
  Range Vocabulary(const ModelConfig& config) const { return PartOf(config.vocab_size, 16, rank, ranks); }
  // Columns in groups of 16 bytes, so that a row's share can be read in whole vectors.
  Range TableColumns(int64_t dim, kernels::DType format) const { return PartOf(dim, kernels::ColumnsOf16Bytes(format), rank, ranks); }
  std::vector<int64_t> TableWidths(int64_t dim, kernels::DType format) const {
    std::vector<int64_t> widths;
    for (int r = 0; r < ranks; ++r) widths.push_back(Shard{r, ranks}.TableColumns(dim, format).size());
    return widths;
  }
};

// The arrays of a batch on the device, and the means to work on them.
struct ForwardContext {
  kernels::Backend* backend = nullptr;
  kernels::Collective* collective = nullptr;  // null with one rank
  int64_t num_tokens = 0;
  kernels::TensorView<const int32_t, 1> positions;      // [num_tokens]
  kernels::TensorView<const int32_t, 1> sequence;       // [num_tokens]
  kernels::TensorView<const int64_t, 1> kv_slots;       // [num_tokens]
  kernels::TensorView<const int32_t, 2> memory_knn;     // [memory layers, num_tokens], or one row for all layers; 0: memory off
  std::vector<bool> memory_on;                          // [memory layers]: for any token of the batch
  kernels::TensorView<const int32_t, 1> masked_end;     // [num_sequences]
  kernels::TensorView<const int32_t, 1> masked_rows;    // empty where no sequence masks any
  kernels::TensorView<const int32_t, 2> block_tables;   // [num_sequences, pages]
  kernels::TensorView<const int32_t, 1> traced_tokens;  // [num_traced]; empty: none
  int32_t* trace_rows = nullptr;                        // out: [memory layers, num_traced, mem_heads, mem_knn]
  float* trace_weights = nullptr;                       // out, beside trace_rows

  // Rows per memory head of each token in a memory layer, by its place among them.
  kernels::TensorView<const int32_t, 1> KnnOf(int memory_layer) const {
    const int64_t row = memory_knn.dim(0) == 1 ? 0 : memory_layer;
    return {memory_knn.data + row * num_tokens, {num_tokens}};
  }
};

}  // namespace memserve::engine
