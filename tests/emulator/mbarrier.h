// mbarrier objects: a phase ends when all arrivals have come and all announced bytes have been
// copied.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "async_proxy.h"
#include "clocks.h"
#include "site.h"

namespace emulator {

struct MBarrier {
  Agent initialised;  // by this thread, at this clock
  int count, pending;
  int64_t bytes = 0;  // announced and not yet copied
  uint32_t phase = 0;
  Join gathered;        // of what arrived in this phase
  Knowledge completed;  // of the phases before
  std::vector<Thread*> waiting;
};
using MBarriers = std::map<const void*, MBarrier>;

// A copy of `bytes` to the block's shared memory that this barrier counts has been carried out.
void complete_bytes(Block& b, const void* barrier, int bytes, Agent agent);

// Ends the launch where there is no barrier, or the asynchronous proxy can't see it yet.
void check_visible_to_copies(const Thread& t, const void* barrier, Site site);

}  // namespace emulator
