#include "kernels/row_store.h"

#include "kernels/reference/reference.h"

namespace memserve::kernels::reference {

void* ReferenceRowStore::DirectRows() { return spec().columns() == spec().dim ? memory_.address() : nullptr; }

void ReferenceRowStore::Store(int64_t first_row, int64_t count, const void* rows, DType source, const float* scales) {
  MEMSERVE_CHECK(0 <= first_row && 0 <= count && first_row + count <= spec().rows);
  ConvertRows({rows, source, scales, spec().dim}, count, spec().first_column, spec().end_column, spec().format,
              static_cast<char*>(memory_.address()) + first_row * RowBytes(spec().format, spec().columns()), scales_.data() + first_row);
}

RowStore::Ticket ReferenceRowStore::Start(const EmbeddingBagArgs& args) {
  started_.emplace(next_ticket_, args);
  return next_ticket_++;
}

absl::Status ReferenceRowStore::Finish(Ticket ticket) {
  const auto node = started_.extract(ticket);
  MEMSERVE_CHECK(!node.empty());
  reference::EmbeddingBag(node.mapped());
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<RowStore>> NewRowStore(const RowStoreSpec& spec) {
  MEMSERVE_CHECK(spec.rows >= 0);
  MEMSERVE_CHECK(0 <= spec.first_column && spec.first_column <= spec.end_column &&
                 spec.end_column <= spec.dim);
  MEMSERVE_CHECK(IsRowFormat(spec.format));
  MEMSERVE_CHECK_EQ(spec.first_column % ColumnsOf16Bytes(spec.format), 0);
  MEMSERVE_CHECK(spec.end_column == spec.dim || spec.end_column % ColumnsOf16Bytes(spec.format) == 0);
  auto memory = AllocateHost(spec.rows * RowBytes(spec.format, spec.columns()), "value table");
  if (!memory.ok()) return memory.status();
  return std::make_unique<ReferenceRowStore>(spec, *std::move(memory));
}

const ReferenceRowStore& Ours(const RowStore* table) {
  const auto* ours = dynamic_cast<const ReferenceRowStore*>(table);
  MEMSERVE_CHECK(ours != nullptr);
  return *ours;
}

}  // namespace memserve::kernels::reference
