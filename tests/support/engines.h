// Engines for tests: started, or the test has failed; and left as they should be.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <thread>
#include <utility>

#include "engine/engine.h"

namespace memserve::testing {

inline std::unique_ptr<engine::Engine> Start(const engine::EngineOptions& options) {
  absl::StatusOr<std::unique_ptr<engine::Engine>> engine = engine::Engine::Create(options);
  EXPECT_TRUE(engine.ok()) << engine.status();
  return engine.ok() ? *std::move(engine) : nullptr;
}

// Pages that were in use must be back soon after nothing runs any more.
inline void ExpectNoPagesLeft(const engine::Engine& engine) {
  for (int i = 0; i < 2000 && engine.load().kv_pages_used > 0; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_EQ(engine.load().kv_pages_used, 0);
  EXPECT_EQ(engine.load().running, 0);
  EXPECT_EQ(engine.load().waiting, 0);
}

}  // namespace memserve::testing
