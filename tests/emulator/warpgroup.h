// Warpgroups: four warps whose 128 threads carry out an instruction together, and what they have
// in flight on the tensor cores.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "async_proxy.h"
#include "clocks.h"
#include "site.h"

namespace emulator {

constexpr int kWarpgroupThreads = 128;

enum class WarpgroupOp { kNone, kWgmma, kSetMaxRegisters };

// Sums that products are in flight to: (64, n), which the threads' registers hold again when the
// last of these products has been waited for.
struct Accumulators {
  int n, group;  // of the last product
  std::vector<float> values;
};

// One thread's view of its warpgroup's products.
struct Products {
  struct InFlight {
    std::shared_ptr<Accumulators> accumulators;
    float* d;  // n / 2 registers
  };
  std::vector<InFlight> in_flight;
  int open_group = 0;
  bool fenced = false;  // by wgmma.fence, since it last waited
};

struct Warpgroup {
  int index;
  Thread* threads;  // 128
  int registers;    // a thread, by setmaxnreg
  // The instruction that some threads have come to.
  WarpgroupOp op;
  int detail;
  Site site;
  int arrived = 0;
  void* arguments[kWarpgroupThreads];
  // Products, counted from 1, are carried out in order.
  uint32_t issued = 0, completed = 0;
  std::map<int, uint32_t> last_of_group;
  std::vector<Thread*> waiting;
  // What its threads together know to be written, kept as long as none learns more.
  std::vector<std::shared_ptr<const Clock>> known_of;
  std::shared_ptr<const Clock> known;
};

void start_warpgroups(Block& b);
Warpgroup& warpgroup_of(const Thread& t, Site site);
void check_products_at_exit(const Thread& t);

// As warp_instruction is.
void meet(Warpgroup& w, WarpgroupOp op, int detail, void* argument, Site site,
          const std::function<void(void* const* arguments)>& execute);

}  // namespace emulator
