// Value table rows in host memory, row-major without gaps, on huge pages.
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cpu/functions.h"
#include "kernels/cpu/host_memory.h"
#include "kernels/embedding_bag.h"
#include "kernels/row_store.h"

namespace memserve::kernels::cpu {

// Every row is -1 or one of the table's; anything else is the caller's bug.
void CheckRows(const RowStoreSpec& spec, TensorView<const int32_t, 2> rows);

class HostRowStore final : public RowStore {
 public:
  // `context` and `functions` are the back end's and outlive the store.
  static absl::StatusOr<std::unique_ptr<HostRowStore>> New(const RowStoreSpec& spec, Context& context, const Functions& functions);

  using RowStore::Store;
  void* DirectRows() override { return spec().columns() == spec().dim ? memory_.as<void>() : nullptr; }
  float* DirectScales() override { return HasScales(spec().format) ? scales_.as<float>() : nullptr; }
  void Store(int64_t first_row, int64_t count, const void* rows, DType source, const float* scales) override;
  Ticket Start(const EmbeddingBagArgs& args) override;
  absl::Status Finish(Ticket ticket) override;
  int64_t bytes() const override { return memory_.bytes() + scales_.bytes(); }
  const char* placement() const override { return "host"; }
  bool huge_pages() const override { return memory_.huge_pages(); }

  int64_t row_bytes() const { return RowBytes(spec().format, spec().columns()); }
  const char* row(int64_t index) const { return memory_.as<char>() + index * row_bytes(); }
  const float* scales() const { return scales_.as<float>(); }  // [rows], where the format has them

 private:
  HostRowStore(const RowStoreSpec& spec, HostMemory memory, HostMemory scales, Context& context, const Functions& functions)
      : RowStore(spec), memory_(std::move(memory)), scales_(std::move(scales)), context_(context), functions_(functions) {}

  struct Pending {
    bool started = false;
    EmbeddingBagArgs args;
  };

  const HostMemory memory_;
  const HostMemory scales_;
  Context& context_;
  const Functions& functions_;
  std::vector<Pending> pending_;  // by ticket; places are used again
};

}  // namespace memserve::kernels::cpu
