// Loads a checkpoint with the installed engine and prints what it continues a prompt of token ids with.
#include <cstdio>
#include <future>

#include "engine/engine.h"

namespace {

class Printer final : public memserve::engine::GenerateListener {
 public:
  void OnDelta(memserve::engine::Delta delta) override {
    for (const int32_t id : delta.token_ids) std::printf("%d ", id);
  }
  void OnFinished(absl::StatusOr<memserve::engine::Finished> finished) override { done.set_value(finished.status()); }
  std::promise<absl::Status> done;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  auto engine = memserve::engine::Engine::Create({.checkpoint = argv[1]});
  if (!engine.ok()) {
    std::fprintf(stderr, "%s\n", engine.status().ToString().c_str());
    return 1;
  }
  auto printer = std::make_shared<Printer>();
  memserve::engine::GenerateRequest request;
  request.prompt = std::vector<int32_t>{256, 84, 104, 101};
  request.stop.max_tokens = 4;
  (*engine)->Generate(request, printer);
  const absl::Status status = printer->done.get_future().get();
  std::printf("\n");
  return status.ok() ? 0 : 1;
}
