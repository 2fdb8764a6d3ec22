#include "kernels/collective.h"

#include <algorithm>
#include <cstring>

#include "kernels/check.h"
#include "kernels/sync.h"

namespace memserve::kernels {
namespace {

// A barrier that all ranks pass or none.
class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}

  // False after Abort, unless all ranks had arrived before it.
  bool ArriveAndWait() {
    MutexLock lock(mutex_);
    if (aborted_) return false;
    const int64_t round = round_;
    if (++arrived_ == size_) {
      arrived_ = 0;
      ++round_;
      all_arrived_.NotifyAll();
    }
    while (round_ == round && !aborted_) all_arrived_.Wait(mutex_);
    return round_ != round;
  }

  void Abort() {
    MutexLock lock(mutex_);
    aborted_ = true;
    all_arrived_.NotifyAll();
  }

 private:
  const int size_;
  Mutex mutex_;
  CondVar all_arrived_;
  int arrived_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t round_ ABSL_GUARDED_BY(mutex_) = 0;
  bool aborted_ ABSL_GUARDED_BY(mutex_) = false;
};

// What the ranks of one group share. A call publishes its tensor, enters when all have, works, and leaves
// when all are done: between enter and leave every rank may read what the others published. Nobody can fail
// there, so Abort, which lets a rank free its tensors, only stops ranks from entering.
struct Group {
  explicit Group(int size) : size(size), enter(size), leave(size), published(size) {}
  const int size;
  Barrier enter;
  Barrier leave;
  std::vector<TensorView<float, 2>> published;  // [size]; each rank writes its own before it enters
};

class InMemoryCollective final : public Collective {
 public:
  InMemoryCollective(std::shared_ptr<Group> group, int rank) : group_(std::move(group)), rank_(rank) {}

  int rank() const override { return rank_; }
  int size() const override { return group_->size; }

  // Every rank sums a share of the elements, for all.
  void AllReduce(TensorView<float, 2> data) override {
    if (!Enter(data)) return;
    for (const auto& other : group_->published) MEMSERVE_CHECK(other.shape == data.shape);
    const int64_t end = data.size() * (rank_ + 1) / size();
    for (int64_t i = data.size() * rank_ / size(); i < end; ++i) {
      float sum = group_->published[0].data[i];
      for (int r = 1; r < size(); ++r) sum += group_->published[r].data[i];
      for (const auto& other : group_->published) other.data[i] = sum;
    }
    group_->leave.ArriveAndWait();
  }

  void AllGather(TensorView<const float, 2> local, std::span<const int64_t> widths,
                 TensorView<float, 2> out) override {
    MEMSERVE_CHECK_EQ(static_cast<int64_t>(widths.size()), size());
    MEMSERVE_CHECK_EQ(local.dim(1), widths[rank_]);
    MEMSERVE_CHECK_EQ(local.dim(0), out.dim(0));
    if (!Enter({const_cast<float*>(local.data), local.shape})) return;
    int64_t first = 0;
    for (int r = 0; r < size(); ++r) {
      const TensorView<const float, 2> from = group_->published[r];
      MEMSERVE_CHECK_EQ(from.dim(0), out.dim(0));
      MEMSERVE_CHECK_EQ(from.dim(1), widths[r]);
      for (int64_t t = 0; t < out.dim(0); ++t) {
        std::copy_n(from.data + t * widths[r], widths[r], out.data + t * out.dim(1) + first);
      }
      first += widths[r];
    }
    MEMSERVE_CHECK_EQ(first, out.dim(1));
    group_->leave.ArriveAndWait();
  }

  void Abort() override { group_->enter.Abort(); }

 private:
  bool Enter(TensorView<float, 2> data) {
    group_->published[rank_] = data;
    return group_->enter.ArriveAndWait();
  }

  const std::shared_ptr<Group> group_;
  const int rank_;
};

}  // namespace

std::vector<std::unique_ptr<Collective>> NewInMemoryCollectives(int size) {
  MEMSERVE_CHECK(size >= 1);
  const auto group = std::make_shared<Group>(size);
  std::vector<std::unique_ptr<Collective>> collectives;
  for (int rank = 0; rank < size; ++rank)
    collectives.push_back(std::make_unique<InMemoryCollective>(group, rank));
  return collectives;
}

}  // namespace memserve::kernels
