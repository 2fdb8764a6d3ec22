// One function for each operation that memserve-bench times; shapes come from flags.
#pragma once

namespace memserve::bench {

void BenchEmbedding();
void BenchRmsNorm();
void BenchLayerNorm();
void BenchRope();
void BenchMatMul();
void BenchAttention();
void BenchSilu();
void BenchSearch();
void BenchGather();
void BenchRowDot();
void BenchCount();
void BenchMask();
void BenchSelectBags();
void BenchRowStats();
void BenchSample();
void BenchLogits();
void BenchModel();
void BenchCounting();
void BenchTableSize();
void BenchTokenizer();

}  // namespace memserve::bench
