#include "mbarrier.h"

#include "block.h"
#include "options.h"
#include "planted_fault.h"
#include "report.h"

namespace emulator {
namespace {

constexpr int kBytes = 8, kMostArrivals = (1 << 20) - 1;

MBarrier& find(const Thread& t, const void* barrier, const char* what, Site site) {
  const auto found = t.block->mbarriers.find(barrier);
  const auto offset = static_cast<const unsigned char*>(barrier) - t.block->shared;
  if (found == t.block->mbarriers.end()) {
    fail(site, "%s: there is no mbarrier at byte %td of shared memory", what, offset);
  }
  MBarrier& m = found->second;
  if (options().races && !observer(t).knows(m.initialised.id, m.initialised.clock)) {
    report(site, "race: %s at byte %td of shared memory isn't ordered after mbarrier.init", what,
           offset);
  }
  return m;
}

void end_phase_if_done(MBarrier& m) {
  if (m.pending != 0 || m.bytes != 0) return;
  ++m.phase;
  m.pending = m.count;
  m.gathered.add(m.completed);
  m.completed = m.gathered.take();
  for (Thread* t : m.waiting) wake(t);
  m.waiting.clear();
}

void arrive(MBarrier& m, Thread& t, int bytes, Site site) {
  if (m.pending == 0) fail(site, "mbarrier: more than the %d arrivals of a phase", m.count);
  if (options().races) {
    m.gathered.add(t.known, t.id, t.clock);
    advance_clock(t);
  }
  m.bytes += bytes;
  --m.pending;
  end_phase_if_done(m);
}

}  // namespace

void mbarrier_init(void* barrier, int count, Site site) {
  Thread& t = *current;
  if (reinterpret_cast<uintptr_t>(barrier) % kBytes != 0) {
    fail(site, "mbarrier.init at %p, not aligned to %d", barrier, kBytes);
  }
  if (count < 1 || count > kMostArrivals) fail(site, "mbarrier.init of %d arrivals", count);
  access_shared(t, barrier, kBytes, Access::kWrite, "mbarrier.init", site);
  if (t.block->mbarriers.count(barrier) != 0) fail(site, "mbarrier.init of what is one already");
  t.block->async.used = true;
  MBarrier& m = t.block->mbarriers[barrier];
  m.initialised = {t.id, t.clock};
  m.count = m.pending = count;
}

void mbarrier_arrive(void* barrier, Site site) {
  if (is_left_out(site)) return;
  arrive(find(*current, barrier, "mbarrier.arrive", site), *current, 0, site);
}

void mbarrier_arrive_expect_tx(void* barrier, int bytes, Site site) {
  if (is_left_out(site)) return;
  arrive(find(*current, barrier, "mbarrier.arrive.expect_tx", site), *current, bytes, site);
}

void mbarrier_wait(void* barrier, int parity, Site site) {
  if (is_left_out(site)) return;
  Thread& t = *current;
  MBarrier& m = find(t, barrier, "mbarrier.try_wait", site);
  while (static_cast<int>(m.phase & 1) == parity) {
    m.waiting.push_back(&t);
    wait("mbarrier.try_wait", site);
  }
  if (!options().races) return;
  Join join;
  join.add(t.known);
  join.add(m.completed);
  t.known = join.take();
}

void complete_bytes(Block& b, const void* barrier, int bytes, Agent agent) {
  MBarrier& m = b.mbarriers.at(barrier);
  if (options().races) m.gathered.add_async(agent.id, agent.clock);
  m.bytes -= bytes;
  end_phase_if_done(m);
}

void check_visible_to_copies(const Thread& t, const void* barrier, Site site) {
  const MBarrier& m = find(t, barrier, "a copy's mbarrier", site);
  if (!options().races) return;
  const Observer copies{t.block->era, kFirstAgent, 0, nullptr, t.known.async.get()};
  if (!copies.knows_written(m.initialised.id, m.initialised.clock)) {
    report(site, "race: a copy's mbarrier comes after mbarrier.init, without a proxy fence");
  }
}

}  // namespace emulator
