// The threads of a block: who runs, who waits on what, and the barriers between them.
//
// A warp's lanes run one after another, each until it has to wait; then the scheduler turns to
// another warp with a lane that can run. All state of a block is in `Block`, so that several can
// be in flight.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "async_copy.h"
#include "async_proxy.h"
#include "bank_conflicts.h"
#include "bulk_copy.h"
#include "clocks.h"
#include "fiber.h"
#include "mbarrier.h"
#include "options.h"
#include "runtime.h"
#include "shadow.h"
#include "warpgroup.h"

namespace emulator {

struct Block;
struct Warp;

struct Thread {
  Fiber fiber;
  Block* block;
  Warp* warp;
  ThreadIds* ids;  // on the thread's own stack, where its reads aren't checked
  int id, lane;    // in the block, in the warp
  bool exited;
  const char* waits_on;  // for the report of a deadlock
  Site waits_at;

  uint32_t clock;  // its releases in this era, from 1
  Knowledge known;
  PendingCopies copies;
  BulkStores bulk_stores;
  Products products;
};

enum class WarpOp { kNone, kShuffle, kBallot, kSyncWarp, kLdmatrix, kMma };

struct Warp {
  Block* block;
  Thread* lanes;      // 32
  uint32_t runnable;  // lanes that could run, without the one that does
  uint32_t polling;   // lanes that run again when the others have had their turn
  bool queued;        // with the scheduler
  // The instruction that some lanes have come to.
  WarpOp op = WarpOp::kNone;
  int detail;
  Site site;
  int arrived = 0;
  void* arguments[32];
  WarpAccesses accesses;  // where bank conflicts are counted
};

struct Barrier {  // 0: of __syncthreads
  int arrived = 0, expected = 0;
  Site site{};
  std::vector<Thread*> waiting;
  uint32_t era = 0;
  Join released;  // by threads that arrive without waiting
};

struct Block {
  int64_t index;  // in the grid
  int threads, live;
  std::vector<Thread> thread;
  std::vector<Warp> warp;
  std::vector<Warpgroup> warpgroup;  // whole ones, of 128 threads
  Barrier barrier[16];
  MBarriers mbarriers;
  AsyncProxy async;
  std::vector<Thread*> want_registers;  // by setmaxnreg.inc
  uint32_t era;
  unsigned char* shared;  // aligned to 1024
  int shared_bytes;
  Shadow shadow;
};

extern Thread* current;  // null while the host or the scheduler runs

// Waits until another thread wakes this one.
void wait(const char* on, Site site);
void wake(Thread* thread);
// As `current` is: lets everyone else run first.
void yield_thread();
[[noreturn]] void abandon_launch();

inline Observer observer(const Thread& t) {
  return {t.block->era, t.id, t.clock, t.known.own.get(), t.known.own.get()};
}
// A new era of the block's clocks.
void enter_era(Block& b);
// __syncthreads waits for the living only.
void forget_exited_thread(Block& b);

// The thread has released what it did so far: what follows isn't part of that.
void advance_clock(Thread& t);

// `what` accesses a range that begins in the block's shared memory: bounds, races.
void access_shared(Thread& t, const void* p, size_t bytes, Access access, const char* what,
                   Site site);

// What of it shared memory's banks are to be counted for.
void note_banks(const Thread& t, std::ptrdiff_t offset, size_t bytes, const char* what, Site site);

uint32_t random_bits();  // of the launch's seed

// Puts the threads of a block at the beginning of `kernel`, on stacks one behind the other.
void start_block(Block& b, int64_t index, const std::function<void()>& kernel,
                 unsigned char* stacks, size_t stack_bytes);

// Runs blocks that were started until all their threads have exited. False: abandoned.
bool run_blocks(const std::vector<Block*>& blocks);

extern const char* const warp_op_names[];
[[noreturn]] void fail_to_meet(const Warp& w, WarpOp op, Site site);

// All 32 lanes of a warp come here with what they bring; the last one carries the instruction out
// for all. `detail` and the line tell instructions of a kind apart.
template <class Argument, class Execute>
void warp_instruction(WarpOp op, int detail, Argument* argument, Site site,
                      const Execute& execute) {
  Thread& t = *current;
  Warp& w = *t.warp;
  if (w.arrived == 0) {
    w.op = op;
    w.detail = detail;
    w.site = site;
  } else if (w.op != op || w.detail != detail || w.site.line != site.line) {
    fail_to_meet(w, op, site);
  }
  w.arguments[t.lane] = argument;
  if (++w.arrived < 32) {
    wait(warp_op_names[static_cast<int>(op)], site);
    return;
  }
  w.arrived = 0;
  if (options().banks) w.accesses.settle();
  w.runnable = ~(1u << t.lane);
  Argument* arguments[32];
  for (int i = 0; i < 32; ++i) arguments[i] = static_cast<Argument*>(w.arguments[i]);
  execute(w, arguments);
}

}  // namespace emulator
