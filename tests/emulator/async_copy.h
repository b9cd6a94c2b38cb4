// cp.async: copies from global to shared memory that are there only when waited for.
#pragma once

#include <vector>

#include "site.h"

namespace emulator {

struct Thread;

constexpr int kCopyBytes = 16;

// One thread's copies in flight, in groups numbered from 0.
struct PendingCopies {
  struct Copy {
    unsigned char* shared;
    const unsigned char* global;
    int bytes;  // from global memory; zeros behind
    int group;
    bool done;  // carried out early; still not waited for
  };
  std::vector<Copy> copies;
  int open_group = 0;
};

// Completion::kRandom: now may be the time.
void complete_at_random(Thread& t);

}  // namespace emulator
