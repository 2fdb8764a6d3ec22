// The rows of a value table, wherever they live: host memory here; disk and device shards fit the same interface. A store may
// hold a column range of the table only (the share of one rank).
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/row_format.h"
#include "kernels/tensor.h"

namespace memserve::kernels {

struct RowStoreSpec {
  int64_t rows = 0;               // at most INT32_MAX: row ids are int32
  int64_t dim = 0;                // columns of the whole table
  int64_t first_column = 0;       // this store holds columns [first_column, end_column): multiples of 16 bytes, but for
  int64_t end_column = 0;         //   the table's last column
  DType format = DType::kF32;     // see row_format.h
  int64_t columns() const { return end_column - first_column; }
};

// Rows that replace those of the table for some bags (a tenant's or a version's row deltas). Owned by the engine; must outlive
// the operation that reads it. Values are f32, [rows.size(), columns of the store].
struct RowOverlay {
  std::vector<int32_t> rows;  // ascending
  std::vector<float> values;
};

struct EmbeddingBagArgs;

class RowStore {
 public:
  explicit RowStore(const RowStoreSpec& spec) : spec_(spec) {}
  virtual ~RowStore() = default;
  RowStore(const RowStore&) = delete;
  RowStore& operator=(const RowStore&) = delete;

  const RowStoreSpec& spec() const { return spec_; }

  // Where the loader may read whole rows of spec().format to (row-major, no gaps), or null: then Store is the way.
  virtual void* DirectRows() { return nullptr; }
  // Where the scales of rows written there go, one a row; null where the format has none or Store is the way.
  virtual float* DirectScales() { return nullptr; }
  // Takes `count` whole rows (spec().dim columns in format `source`; `scales`, one a row, where that has them) from `first_row` on,
  // and keeps this store's columns in its own format. Threads may store disjoint rows at once.
  virtual void Store(int64_t first_row, int64_t count, const void* rows, DType source, const float* scales) = 0;
  void Store(int64_t first_row, int64_t count, const void* rows, DType source) { Store(first_row, count, rows, source, nullptr); }

  // EmbeddingBag in two halves (contract: embedding_bag.h), so that a store on disk or on the host can work while the caller
  // computes the gate. Start may return before anything was read; the arrays of `args` must stay as they are until Finish,
  // which fills args.out. Each ticket is finished once. A host store does all its work in Finish.
  // Finish gives an error only for what the machine can get wrong (a disk that fails).
  using Ticket = int64_t;
  virtual Ticket Start(const EmbeddingBagArgs& args) = 0;
  virtual absl::Status Finish(Ticket ticket) = 0;

  virtual int64_t bytes() const = 0;                  // held, padding included
  virtual const char* placement() const = 0;          // "host", "disk", "device"
  virtual bool huge_pages() const { return false; }   // asked for and aligned for them

 private:
  const RowStoreSpec spec_;
};

}  // namespace memserve::kernels
