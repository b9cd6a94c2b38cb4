// What works beside the threads: bulk copies (TMA) and warpgroups' products (wgmma). They are
// issued, carried out at some time after that, and waited for by mbarriers, bulk groups or
// wgmma.wait_group.
//
// In the clocks each is an agent of its own. It reads and writes shared memory through the
// asynchronous proxy: of what threads wrote it may rely on what they did before a
// fence.proxy.async.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "shadow.h"

namespace emulator {

struct Block;
struct Thread;

struct Agent {
  int id;
  uint32_t clock;
};

constexpr int kMostWarpgroups = 8;
constexpr int kCopyAgents = 64;  // taken in turn: far more than are in flight

struct AsyncProxy {
  // No more eras: what is in flight isn't ordered by a barrier of all threads.
  bool used = false;
  struct Operation {
    int queue;  // those of a queue are carried out in order; kNoQueue: in any
    std::function<void()> carry_out;
  };
  static constexpr int kNoQueue = -1;
  std::vector<Operation> pending;
  uint32_t copies = 0;  // so far
};

Agent new_copy_agent(Block& b);

// Carries it out now, or lets it be carried out later.
void start_operation(Block& b, AsyncProxy::Operation operation);

// Carries out one that may be next. False: there is none.
bool complete_one(Block& b);

// `known`: what was done before it; `async`: what was written for it.
Observer observer(const Block& b, Agent agent, const Clock* known, const Clock* async);

}  // namespace emulator
