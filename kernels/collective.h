// What ranks of one model exchange. All ranks call the same operations in the same order with equal shapes; each call is enqueued
// like any other operation of the rank's back end. Sums are taken in rank order, so every rank holds the same bits.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "kernels/tensor.h"

namespace memserve::kernels {

class Collective {
 public:
  virtual ~Collective() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;

  // data becomes the sum over ranks, element by element, added in rank order from rank 0.
  virtual void AllReduce(TensorView<float, 2> data) = 0;
  // out[t, :] = the ranks' local[t, :] one after the other. Widths may differ between ranks; widths[r] is rank r's.
  virtual void AllGather(TensorView<const float, 2> local, std::span<const int64_t> widths, TensorView<float, 2> out) = 0;
  // Ends all waiting: a rank that fails must not leave the others hanging. Afterwards every call returns at once, with undefined data.
  virtual void Abort() = 0;
};

// `size` ranks in one process, one thread each, exchanging through host memory. Element i belongs to rank i.
std::vector<std::unique_ptr<Collective>> NewInMemoryCollectives(int size);

}  // namespace memserve::kernels
