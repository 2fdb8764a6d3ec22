#include "kernels/cpu/row_store.h"

#include <algorithm>
#include <limits>

namespace memserve::kernels::cpu {
namespace {

int64_t TableBytes(const RowStoreSpec& spec) {
  const __int128 bytes = static_cast<__int128>(spec.rows) * RowBytes(spec.format, spec.columns());
  return static_cast<int64_t>(std::min<__int128>(bytes, std::numeric_limits<int64_t>::max()));
}

}  // namespace

void CheckRows(const RowStoreSpec& spec, TensorView<const int32_t, 2> rows) {
  bool good = true;
  for (int64_t i = 0; i < rows.size(); ++i) good &= rows.data[i] >= -1 && rows.data[i] < spec.rows;
  MEMSERVE_CHECK(good);
}

absl::StatusOr<std::unique_ptr<HostRowStore>> HostRowStore::New(const RowStoreSpec& spec, Context& context,
                                                                const Functions& functions) {
  MEMSERVE_CHECK(IsRowFormat(spec.format));
  MEMSERVE_CHECK(spec.rows >= 0 && spec.rows <= std::numeric_limits<int32_t>::max());
  MEMSERVE_CHECK(spec.first_column >= 0 && spec.first_column <= spec.end_column && spec.end_column <= spec.dim);
  absl::StatusOr<HostMemory> memory = HostMemory::Allocate(TableBytes(spec), "value table");
  if (!memory.ok()) return memory.status();
  absl::StatusOr<HostMemory> scales = HostMemory::Allocate(HasScales(spec.format) ? spec.rows * sizeof(float) : 0, "value table's scales");
  if (!scales.ok()) return scales.status();
  return std::unique_ptr<HostRowStore>(new HostRowStore(spec, *std::move(memory), *std::move(scales), context, functions));
}

void HostRowStore::Store(int64_t first_row, int64_t count, const void* rows, DType source, const float* scales) {
  MEMSERVE_CHECK(first_row >= 0 && count >= 0 && first_row + count <= spec().rows);
  ConvertRows({rows, source, scales, spec().dim}, count, spec().first_column, spec().end_column, spec().format,
              memory_.as<char>() + first_row * row_bytes(), scales_.as<float>() + first_row);
}

RowStore::Ticket HostRowStore::Start(const EmbeddingBagArgs& args) {
  MEMSERVE_CHECK(args.weights.shape == args.rows.shape);
  MEMSERVE_CHECK_EQ(args.out.dim(0), args.rows.dim(0));
  MEMSERVE_CHECK_EQ(args.out.dim(1), spec().columns());
  if (args.overlay_of_bag) MEMSERVE_CHECK_EQ(args.overlay_of_bag.dim(0), args.rows.dim(0));
  const auto free = std::find_if(pending_.begin(), pending_.end(), [](const Pending& p) { return !p.started; });
  const Ticket ticket = free - pending_.begin();
  if (free == pending_.end()) pending_.emplace_back();
  pending_[ticket] = {true, args};
  return ticket;
}

absl::Status HostRowStore::Finish(Ticket ticket) {
  MEMSERVE_CHECK(ticket >= 0 && ticket < static_cast<Ticket>(pending_.size()) && pending_[ticket].started);
  pending_[ticket].started = false;
  const EmbeddingBagArgs& args = pending_[ticket].args;
  CheckRows(spec(), args.rows);
  functions_.embedding_bag(context_, *this, args);
  return absl::OkStatus();
}

}  // namespace memserve::kernels::cpu
