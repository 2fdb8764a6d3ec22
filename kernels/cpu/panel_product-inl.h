// Products of rows with packed panels: out[r, n] = Σ_k x[r, k] · weight[n, k], lanes over n, one fma chain over ascending k for
// each output whatever the number of rows and panels taken at once.
#if defined(MEMSERVE_KERNELS_CPU_PANEL_PRODUCT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MEMSERVE_KERNELS_CPU_PANEL_PRODUCT_INL_H_
#undef MEMSERVE_KERNELS_CPU_PANEL_PRODUCT_INL_H_
#else
#define MEMSERVE_KERNELS_CPU_PANEL_PRODUCT_INL_H_
#endif

#include "kernels/cpu/lanes-inl.h"
#include "kernels/cpu/weight_matrix.h"

HWY_BEFORE_NAMESPACE();
namespace memserve::kernels::cpu::HWY_NAMESPACE {

// Tiles fill the registers with sums: many short chains hide the latency of a multiply-add.
#if HWY_TARGET == HWY_SCALAR
inline constexpr int kTileRows = 1, kTilePanels = 1, kSinglePanels = 1;
#elif HWY_TARGET == HWY_AVX2
inline constexpr int kTileRows = 6, kTilePanels = 1, kSinglePanels = 4;
#else
inline constexpr int kTileRows = 6, kTilePanels = 4, kSinglePanels = 4;
#endif

// Where a product's rows come from and go to. Rows lie `x_stride` and `out_stride` floats apart.
struct ProductRows {
  const float* x;
  int64_t x_stride;
  float* out;  // the first panel's outputs
  int64_t out_stride;
  int64_t columns;    // outputs from there on; panels may reach beyond
  const float* bias;  // of the first panel, or null
};

template <int kRows, int kPanels>
HWY_INLINE void AddProducts(const Lanes (&weight)[kPanels], const float* x, int64_t x_stride, Lanes (&sums)[kRows][kPanels]) {
  for (int r = 0; r < kRows; ++r) {
    const Lanes value = Set(x[r * x_stride]);
    for (int n = 0; n < kPanels; ++n) sums[r][n] = MulAdd(weight[n], value, sums[r][n]);
  }
}

// `width`: outputs of the block that the panels lie in.
template <int kRows, int kPanels>
HWY_INLINE void SumOverK(const float* panel, int64_t width, int64_t k, const float* x, int64_t x_stride,
                         Lanes (&sums)[kRows][kPanels]) {
  for (int64_t i = 0; i < k; ++i, panel += width) {
    Lanes weight[kPanels];
    for (int n = 0; n < kPanels; ++n) weight[n] = Load(panel + n * kPanel);
    AddProducts<kRows, kPanels>(weight, x + i, x_stride, sums);
  }
}

template <int kRows, int kPanels>
HWY_INLINE void SumOverK(const BFloat16* panel, int64_t width, int64_t k, const float* x, int64_t x_stride,
                         Lanes (&sums)[kRows][kPanels]) {
  Lanes weight[kPanels];
  const auto add_even = [&](int64_t i) HWY_ATTR {
    for (int n = 0; n < kPanels; ++n) weight[n] = LoadEven(panel + 2 * n * kPanel);
    AddProducts<kRows, kPanels>(weight, x + i, x_stride, sums);
  };
  const auto add_odd = [&](int64_t i) HWY_ATTR {
    for (int n = 0; n < kPanels; ++n) weight[n] = LoadOdd(panel + 2 * n * kPanel);
    AddProducts<kRows, kPanels>(weight, x + i, x_stride, sums);
  };
  int64_t i = 0;
  for (; i + 2 <= k; i += 2, panel += 2 * width) {
    add_even(i);
    add_odd(i + 1);
  }
  if (i < k) add_even(i);
}

template <int kRows, int kPanels, typename T>
void Tile(const T* panel, int64_t width, int64_t k, const ProductRows& rows) {
  Lanes sums[kRows][kPanels];
  for (int r = 0; r < kRows; ++r) {
    for (int n = 0; n < kPanels; ++n) sums[r][n] = Zero();
  }
  SumOverK<kRows, kPanels>(panel, width, k, rows.x, rows.x_stride, sums);
  for (int n = 0; n < kPanels; ++n) {
    const int64_t columns = rows.columns - n * kPanel;
    for (int r = 0; r < kRows; ++r) {
      if (rows.bias != nullptr) sums[r][n] = sums[r][n] + LoadFirst(rows.bias + n * kPanel, columns);
      StoreFirst(sums[r][n], rows.out + r * rows.out_stride + n * kPanel, columns);
    }
  }
}

// kPanels panels for any number of rows.
template <int kPanels, typename T>
void TileRows(const T* panel, int64_t width, int64_t k, int64_t count, ProductRows rows) {
  const auto next = [&](int64_t taken) {
    rows.x += taken * rows.x_stride;
    rows.out += taken * rows.out_stride;
    count -= taken;
  };
  while (count > 0) {
    switch (std::min<int64_t>(count, kTileRows)) {
#if HWY_TARGET != HWY_SCALAR
      case 6:
        Tile<6, kPanels>(panel, width, k, rows);
        next(6);
        break;
      case 5:
        Tile<5, kPanels>(panel, width, k, rows);
        next(5);
        break;
      case 4:
        Tile<4, kPanels>(panel, width, k, rows);
        next(4);
        break;
      case 3:
        Tile<3, kPanels>(panel, width, k, rows);
        next(3);
        break;
      case 2:
        Tile<2, kPanels>(panel, width, k, rows);
        next(2);
        break;
#endif
      default:
        Tile<1, kPanels>(panel, width, k, rows);
        next(1);
    }
  }
}

// Panels [first, end) of a group for `count` rows; `first` begins a block; `rows.out` and `rows.bias` are those of panel `first`.
template <typename T>
void PanelProduct(const PackedMatrix& weight, int64_t group, int64_t first, int64_t end, int64_t count, ProductRows rows) {
  constexpr int64_t kPair = sizeof(T) == 2 ? 2 : 1;  // values of an output side by side
  const int64_t k = weight.spec().k;
  for (; first < end; first += kBlockPanels) {
    const int64_t panels = weight.BlockPanels(first), width = panels * kPanel;
    const T* block = weight.Block<T>(group, first);
    const auto next = [&](int64_t taken) {
      block += taken * kPanel * kPair;
      rows.out += taken * kPanel;
      rows.columns -= taken * kPanel;
      if (rows.bias != nullptr) rows.bias += taken * kPanel;
    };
    if (count == 1 && panels == kSinglePanels) {
      Tile<1, kSinglePanels>(block, width, k, rows);
      next(panels);
    } else if (panels == kTilePanels) {
      TileRows<kTilePanels>(block, width, k, count, rows);
      next(panels);
    } else {
      for (int64_t n = 0; n < panels; ++n, next(1)) TileRows<1>(block, width, k, count, rows);
    }
  }
}

inline void PanelProduct(const PackedMatrix& weight, int64_t group, int64_t first, int64_t end, int64_t count,
                         const ProductRows& rows) {
  weight.spec().dtype == DType::kF32 ? PanelProduct<float>(weight, group, first, end, count, rows)
                                     : PanelProduct<BFloat16>(weight, group, first, end, count, rows);
}

// Panels that one task takes: whole blocks that fit the second cache while the rows pass, and enough tasks to share.
inline int64_t TaskPanels(const PackedMatrix& weight) {
  constexpr int64_t kTaskBytes = 256 << 10;
  const int64_t panel_bytes = std::max<int64_t>(1, weight.panel_values() * SizeOf(weight.spec().dtype));
  return std::clamp<int64_t>(kTaskBytes / panel_bytes / kBlockPanels, 1, 8) * kBlockPanels;
}

// What a product costs on one thread: the weights' bytes or the multiply-adds, whichever is more.
inline double ProductNs(const PackedMatrix& weight, int64_t rows) {
  const double values = static_cast<double>(weight.spec().groups) * weight.spec().n * weight.spec().k;
  return std::max(values * SizeOf(weight.spec().dtype) / 25, values * rows / 40);
}

// `count` rows of x rounded to the weight's activation type, `k` apart; x itself where nothing is to be rounded.
struct RoundedRows {
  const float* x;
  int64_t stride;
};
inline RoundedRows Rounded(ThreadPool& pool, Scratch& scratch, const PackedMatrix& weight, const float* x, int64_t count,
                           int64_t k) {
  if (weight.spec().activation == DType::kF32) return {x, k};
  float* rounded = scratch.Get<float>(count * k);
  pool.ParallelFor(count, count * k * 0.2, [&](int64_t r, int) {
    for (int64_t i = 0; i < k; i += kLanes) {
      StoreFirst(RoundToBFloat16(LoadFirst(x + r * k + i, k - i)), rounded + r * k + i, k - i);
    }
  });
  return {rounded, k};
}

}  // namespace memserve::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // MEMSERVE_KERNELS_CPU_PANEL_PRODUCT_INL_H_
