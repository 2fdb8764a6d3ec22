#include "kernels/cpu/row_store.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace memserve::kernels::cpu {
namespace {

int64_t TableBytes(const RowStoreSpec& spec) {
  const __int128 bytes = static_cast<__int128>(spec.rows) * spec.columns() * SizeOf(spec.format);
  return static_cast<int64_t>(std::min<__int128>(bytes, std::numeric_limits<int64_t>::max()));
}

template <typename To, typename From>
void CopyValues(const From* from, To* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (std::is_same_v<To, BFloat16>) {
      to[i] = ToBFloat16(ToFloat(from[i]));
    } else {
      to[i] = ToFloat(from[i]);
    }
  }
}

}  // namespace

void CheckRows(const RowStoreSpec& spec, TensorView<const int32_t, 2> rows) {
  bool good = true;
  for (int64_t i = 0; i < rows.size(); ++i) good &= rows.data[i] >= -1 && rows.data[i] < spec.rows;
  MEMSERVE_CHECK(good);
}

absl::StatusOr<std::unique_ptr<HostRowStore>> HostRowStore::New(const RowStoreSpec& spec, Context& context,
                                                                const Functions& functions) {
  MEMSERVE_CHECK(spec.format == DType::kF32 || spec.format == DType::kBF16);
  MEMSERVE_CHECK(spec.rows >= 0 && spec.rows <= std::numeric_limits<int32_t>::max());
  MEMSERVE_CHECK(spec.first_column >= 0 && spec.first_column <= spec.end_column && spec.end_column <= spec.dim);
  absl::StatusOr<HostMemory> memory = HostMemory::Allocate(TableBytes(spec), "value table");
  if (!memory.ok()) return memory.status();
  return std::unique_ptr<HostRowStore>(new HostRowStore(spec, *std::move(memory), context, functions));
}

void HostRowStore::Store(int64_t first_row, int64_t count, const void* rows, DType source) {
  MEMSERVE_CHECK(first_row >= 0 && count >= 0 && first_row + count <= spec().rows);
  MEMSERVE_CHECK(source == DType::kF32 || source == DType::kBF16);
  const int64_t columns = spec().columns();
  const auto store = [&](const auto* from, auto* to) {
    from += spec().first_column;
    to += first_row * columns;
    for (int64_t r = 0; r < count; ++r) {
      if (source == spec().format) {
        std::memcpy(to + r * columns, from + r * spec().dim, columns * SizeOf(source));
      } else {
        CopyValues(from + r * spec().dim, to + r * columns, columns);
      }
    }
  };
  const auto* f32 = static_cast<const float*>(rows);
  const auto* bf16 = static_cast<const BFloat16*>(rows);
  if (spec().format == DType::kF32) {
    source == DType::kF32 ? store(f32, memory_.as<float>()) : store(bf16, memory_.as<float>());
  } else {
    source == DType::kF32 ? store(f32, memory_.as<BFloat16>()) : store(bf16, memory_.as<BFloat16>());
  }
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
