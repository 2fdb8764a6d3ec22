// Operations whose outputs depend on one token alone and cost little: norm, rotary, gates.
#include <cmath>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/elementwise.cc"
#include "kernels/cpu/foreach_target.h"
#include "kernels/cpu/functions.h"
#include "kernels/cpu/lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace memserve::kernels::cpu::HWY_NAMESPACE {

constexpr double kStreamNs = 0.1;  // of a float that is read or written, on one thread
constexpr double kExpNs = 0.5;     // of a float that goes through Exp

void AddTo(float* x, const float* delta, int64_t dim) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    StoreFirst(LoadFirst(x + d, dim - d) + LoadFirst(delta + d, dim - d), x + d, dim - d);
  }
}

void Normalise(const float* x, const float* weight, int64_t dim, float eps, float* out) {
  Lanes squares = Zero();
  for (int64_t d = 0; d < dim; d += kLanes) {
    const Lanes v = LoadFirst(x + d, dim - d);
    squares = MulAdd(v, v, squares);
  }
  const Lanes scale = Set(1.0f / std::sqrt(Sum(squares) / static_cast<float>(dim) + eps));
  for (int64_t d = 0; d < dim; d += kLanes) {
    StoreFirst(LoadFirst(x + d, dim - d) * scale * LoadFirst(weight + d, dim - d), out + d, dim - d);
  }
}

void RmsNorm(Context& context, const RmsNormArgs& args) {
  const int64_t num_tokens = args.x.dim(0), dim = args.x.dim(1);
  context.pool.ParallelFor(num_tokens, num_tokens * dim * 4 * kStreamNs, [&](int64_t t, int) {
    float* x = args.x.data + t * dim;
    if (args.delta && (!args.delta_on || args.delta_on(t) != 0)) AddTo(x, args.delta.data + t * dim, dim);
    if (args.out) Normalise(x, args.weight.data, dim, args.eps, args.out.data + t * dim);
  });
}

// Lanes beyond dim must stay out of the variance: they are masked again after the mean was taken off.
void NormaliseByVariance(const float* x, const float* weight, const float* bias, int64_t dim, float eps, float* out) {
  Lanes sum = Zero();
  for (int64_t d = 0; d < dim; d += kLanes) sum = sum + LoadFirst(x + d, dim - d);
  const Lanes mean = Set(Sum(sum) / static_cast<float>(dim));
  Lanes squares = Zero();
  for (int64_t d = 0; d < dim; d += kLanes) {
    const Lanes v = Select(FirstLanes(dim - d), LoadFirst(x + d, dim - d) - mean, Zero());
    squares = MulAdd(v, v, squares);
  }
  const Lanes scale = Set(1.0f / std::sqrt(Sum(squares) / static_cast<float>(dim) + eps));
  for (int64_t d = 0; d < dim; d += kLanes) {
    const Lanes v = (LoadFirst(x + d, dim - d) - mean) * scale * LoadFirst(weight + d, dim - d);
    StoreFirst(bias == nullptr ? v : v + LoadFirst(bias + d, dim - d), out + d, dim - d);
  }
}

void LayerNorm(Context& context, const LayerNormArgs& args) {
  const int64_t num_tokens = args.x.dim(0), dim = args.x.dim(1);
  context.pool.ParallelFor(num_tokens, num_tokens * dim * 5 * kStreamNs, [&](int64_t t, int) {
    NormaliseByVariance(args.x.data + t * dim, args.weight.data, args.bias.data, dim, args.eps, args.out.data + t * dim);
  });
}

// One head: plain loops, which the compiler turns into vectors; products and sums are rounded one by one.
void TurnInterleaved(float* x, const float* cos, const float* sin, int64_t half_dim) {
  for (int64_t i = 0; i < half_dim; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * cos[i] - b * sin[i];
    x[2 * i + 1] = a * sin[i] + b * cos[i];
  }
}
void TurnHalves(float* x, const float* cos, const float* sin, int64_t half_dim) {
  for (int64_t i = 0; i < half_dim; ++i) {
    const float a = x[i], b = x[half_dim + i];
    x[i] = a * cos[i] - b * sin[i];
    x[half_dim + i] = a * sin[i] + b * cos[i];
  }
}

void Rope(Context& context, const RopeArgs& args) {
  const int64_t num_tokens = args.x.dim(0), heads = args.x.dim(1), head_dim = args.x.dim(2);
  const int64_t half_dim = args.cos.dim(1);
  context.pool.ParallelFor(num_tokens, args.x.size() * 3 * kStreamNs, [&](int64_t t, int) {
    const float* cos = args.cos.data + args.positions(t) * half_dim;
    const float* sin = args.sin.data + args.positions(t) * half_dim;
    for (int64_t h = 0; h < heads; ++h) {
      float* x = args.x.data + (t * heads + h) * head_dim;
      args.pairing == RopePairing::kInterleaved ? TurnInterleaved(x, cos, sin, half_dim) : TurnHalves(x, cos, sin, half_dim);
    }
  });
}

void SiluProductOf(const float* a, const float* b, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Lanes gate = LoadFirst(a + i, count - i);
    const Lanes silu = gate / (Set(1.0f) + Exp(Zero() - gate));
    StoreFirst(silu * LoadFirst(b + i, count - i), out + i, count - i);
  }
}

void SiluProduct(Context& context, const SiluProductArgs& args) {
  constexpr int64_t kRun = 4096;
  const int64_t count = args.out.size();
  context.pool.ParallelFor((count + kRun - 1) / kRun, count * kExpNs, [&](int64_t run, int) {
    const int64_t at = run * kRun;
    SiluProductOf(args.a.data + at, args.b.data + at, args.out.data + at, std::min(kRun, count - at));
  });
}

void ScaleBySigmoid(float gate, float* x, int64_t n) {
  const Lanes scale = Sigmoid(Set(gate));
  for (int64_t i = 0; i < n; i += kLanes) StoreFirst(LoadFirst(x + i, n - i) * scale, x + i, n - i);
}

void SigmoidGate(Context& context, const SigmoidGateArgs& args) {
  const int64_t num_tokens = args.x.dim(0), n = args.x.dim(1);
  context.pool.ParallelFor(num_tokens, args.x.size() * 2 * kStreamNs,
                           [&](int64_t t, int) { ScaleBySigmoid(args.gate(t, 0), args.x.data + t * n, n); });
}

}  // namespace memserve::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace memserve::kernels::cpu {

HWY_EXPORT(RmsNorm);
HWY_EXPORT(LayerNorm);
HWY_EXPORT(Rope);
HWY_EXPORT(SiluProduct);
HWY_EXPORT(SigmoidGate);

void AddElementwise(size_t index, Functions& functions) {
  functions.rms_norm = HWY_DISPATCH_TABLE(RmsNorm)[index];
  functions.layer_norm = HWY_DISPATCH_TABLE(LayerNorm)[index];
  functions.rope = HWY_DISPATCH_TABLE(Rope)[index];
  functions.silu_product = HWY_DISPATCH_TABLE(SiluProduct)[index];
  functions.sigmoid_gate = HWY_DISPATCH_TABLE(SigmoidGate)[index];
}

}  // namespace memserve::kernels::cpu
#endif
