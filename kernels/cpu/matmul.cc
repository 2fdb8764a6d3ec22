#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/matmul.cc"
#include "kernels/cpu/foreach_target.h"
#include "kernels/cpu/functions.h"
#include "kernels/cpu/panel_product-inl.h"

HWY_BEFORE_NAMESPACE();
namespace memserve::kernels::cpu::HWY_NAMESPACE {

constexpr int64_t kTaskRows = 96;

void MatMul(Context& context, const PackedMatrix& weight, const MatMulArgs& args) {
  const int64_t m = args.x.dim(0), n = weight.spec().n, k = weight.spec().k;
  if (m == 0) return;
  const RoundedRows x = Rounded(context.pool, context.rounded, weight, args.x.data, m, k);
  const int64_t task_panels = TaskPanels(weight);
  const int64_t panel_blocks = (weight.panels() + task_panels - 1) / task_panels;
  const int64_t row_blocks = (m + kTaskRows - 1) / kTaskRows;
  context.pool.ParallelFor(panel_blocks * row_blocks, ProductNs(weight, m), [&](int64_t task, int) {
    const int64_t panel = task / row_blocks * task_panels;
    const int64_t row = task % row_blocks * kTaskRows;
    const int64_t first = panel * kPanel;
    PanelProduct(weight, 0, panel, std::min(weight.panels(), panel + task_panels), std::min(kTaskRows, m - row),
                 {.x = x.x + row * x.stride,
                  .x_stride = x.stride,
                  .out = args.out.data + row * n + first,
                  .out_stride = n,
                  .columns = n - first,
                  .bias = args.bias ? args.bias.data + first : nullptr});
  });
}

}  // namespace memserve::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace memserve::kernels::cpu {

HWY_EXPORT(MatMul);

void AddMatMul(size_t index, Functions& functions) { functions.mat_mul = HWY_DISPATCH_TABLE(MatMul)[index]; }

}  // namespace memserve::kernels::cpu
#endif
