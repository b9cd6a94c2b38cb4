// cp.async.bulk.tensor and cp.reduce.async.bulk.tensor: boxes of tensors to and from shared memory.
#pragma once

#include <memory>
#include <vector>

#include "async_proxy.h"
#include "site.h"

namespace emulator {

// One thread's copies from shared to global memory, in groups numbered from 0.
struct BulkStores {
  enum class State { kIssued, kRead, kWritten };
  struct Store {
    int group;
    State state = State::kIssued;
    Thread* owner;
    Agent agent;
  };
  std::vector<std::shared_ptr<Store>> stores;  // not waited for
  int open_group = 0;
  bool waits = false;
};

void check_bulk_stores_at_exit(const Thread& t);

// Where 16 bytes at this address lie under the 128-byte swizzle: bits 4 … 6 are exchanged with
// bits 7 … 9.
constexpr uintptr_t swizzle(uintptr_t address) { return address ^ (address >> 7 & 7) << 4; }

}  // namespace emulator
