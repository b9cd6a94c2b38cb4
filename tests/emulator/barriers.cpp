// __syncthreads and the named barriers: who has come, and what everyone knows behind them.
#include "block.h"
#include "options.h"
#include "planted_fault.h"
#include "report.h"

namespace emulator {

// What happened before a barrier of all threads is known to everyone behind it.
void enter_era(Block& b) {
  static uint32_t eras;
  b.era = ++eras;
  Join join;
  for (const Thread& t : b.thread) join.add_others(t.known);
  const Knowledge joined = join.take();
  for (Thread& t : b.thread) {
    t.clock = 1;
    t.known = joined;
  }
}

namespace {

void complete(Block& b, Barrier& barrier) {
  if (options().races) {
    if (static_cast<int>(barrier.waiting.size()) == b.live && !b.async.used) {
      enter_era(b);
    } else {
      if (barrier.era != b.era) barrier.released.forget_own();
      for (Thread* t : barrier.waiting) barrier.released.add(t->known, t->id, t->clock);
      const Knowledge joined = barrier.released.take();
      for (Thread* t : barrier.waiting) {
        t->known = joined;
        advance_clock(*t);
      }
    }
  }
  if (options().banks) {
    for (Thread* t : barrier.waiting) t->warp->accesses.settle();
  }
  barrier.arrived = 0;
  for (Thread* t : barrier.waiting) {
    if (t != current) wake(t);
  }
  barrier.waiting.clear();
}

}  // namespace

void forget_exited_thread(Block& b) {
  Barrier& barrier = b.barrier[0];
  if (b.live > 0 && barrier.arrived == b.live) complete(b, barrier);
}

void sync_threads(Site site) {
  if (is_left_out(site)) return;
  Thread& t = *current;
  Block& b = *t.block;
  Barrier& barrier = b.barrier[0];
  if (barrier.arrived == 0) {
    barrier.site = site;
  } else if (barrier.site.line != site.line) {
    report(site, "__syncthreads here meets that at line %d", barrier.site.line);
  }
  barrier.waiting.push_back(&t);
  if (++barrier.arrived == b.live) {
    complete(b, barrier);
  } else {
    wait("__syncthreads", site);
  }
}

void named_barrier(int id, int threads, bool waits, Site site) {
  if (is_left_out(site)) return;
  Thread& t = *current;
  Block& b = *t.block;
  if (id < 1 || id > 15) fail(site, "there is no barrier %d", id);
  if (threads <= 0 || threads % 32 != 0 || threads > b.threads) {
    fail(site, "barrier %d of %d threads in a block of %d", id, threads, b.threads);
  }
  Barrier& barrier = b.barrier[id];
  if (barrier.arrived == 0) {
    barrier.expected = threads;
    barrier.era = b.era;
  } else if (barrier.expected != threads) {
    fail(site, "barrier %d of %d threads and of %d", id, threads, barrier.expected);
  }
  ++barrier.arrived;
  if (waits) {
    barrier.waiting.push_back(&t);
  } else if (options().races) {
    if (barrier.era != b.era) barrier.released.forget_own();
    barrier.era = b.era;
    barrier.released.add(t.known, t.id, t.clock);
    advance_clock(t);
  }
  if (barrier.arrived == threads) {
    complete(b, barrier);
  } else if (waits) {
    wait("a named barrier", site);
  }
}

}  // namespace emulator
