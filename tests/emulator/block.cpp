#include "block.h"

#include <algorithm>
#include <map>
#include <string>

#include "options.h"
#include "report.h"

namespace emulator {

Thread* current;

namespace {

Fiber scheduler;
const std::vector<Block*>* running;
std::vector<Warp*> ready;  // from `ready_head` on
size_t ready_head;
bool abandoned;
int64_t yields;  // since a thread last got on

void enqueue(Warp* w) {
  if (!w->queued) {
    w->queued = true;
    ready.push_back(w);
  }
}

Warp* next_warp() {
  if (ready_head > 1024) {
    ready.erase(ready.begin(), ready.begin() + static_cast<std::ptrdiff_t>(ready_head));
    ready_head = 0;
  }
  if (options().seed != 0) {
    std::swap(ready[ready_head], ready[ready_head + random_bits() % (ready.size() - ready_head)]);
  }
  Warp* w = ready[ready_head++];
  w->queued = false;
  return w;
}

// Carries out some asynchronous operation. False: there is none.
bool complete_any() {
  return std::any_of(running->begin(), running->end(), [](Block* b) { return complete_one(*b); });
}

// Goes on with another lane of the warp, or with the scheduler when none can run.
void leave(Thread* self) {
  Warp& w = *self->warp;
  if (w.runnable != 0) {
    const int lane = __builtin_ctz(w.runnable);
    w.runnable &= w.runnable - 1;
    current = &w.lanes[lane];
    if (current != self) fiber_switch(&self->fiber, &current->fiber);
  } else {
    current = nullptr;
    fiber_switch(&self->fiber, &scheduler);
  }
}

void report_deadlock(const std::vector<Block*>& blocks) {
  std::string text;
  int warps = 0;
  for (const Block* b : blocks) {
    for (const Warp& w : b->warp) {
      std::map<std::string, int> lanes;
      for (int i = 0; i < 32; ++i) {
        const Thread& t = w.lanes[i];
        lanes[t.exited ? "have exited"
                       : std::string("wait in ") + t.waits_on + " (line " +
                             std::to_string(t.waits_at.line) + ")"]++;
      }
      if (lanes.size() == 1 && lanes.begin()->first == "have exited") continue;
      if (++warps > 8) continue;
      text += "\n    block " + std::to_string(b->index) + " warp " +
              std::to_string(&w - b->warp.data()) + ":";
      for (const auto& [what, count] : lanes)
        text += " " + std::to_string(count) + " lanes " + what + ";";
    }
  }
  report(Site{}, "deadlock: no thread can go on%s", text.c_str());
}

}  // namespace

void wait(const char* on, Site site) {
  Thread* self = current;
  self->waits_on = on;
  self->waits_at = site;
  yields = 0;
  if (options().completion == Completion::kRandom) {
    if (!self->copies.copies.empty()) complete_at_random(*self);
    if (random_bits() % 4 == 0) complete_one(*self->block);
  }
  leave(self);
}

void wake(Thread* t) {
  Warp* w = t->warp;
  w->runnable |= 1u << t->lane;
  if (current == nullptr || current->warp != w) enqueue(w);
}

void yield_thread() {
  Thread* self = current;
  if (++yields > 1000000) fail(Site{}, "a million polls in a row, and no thread got on");
  if (yields % 64 == 0) complete_any();  // what is polled for may wait for it
  self->warp->polling |= 1u << self->lane;
  enqueue(self->warp);
  leave(self);
}

void abandon_launch() {
  abandoned = true;
  Fiber dropped;  // nobody comes back
  current = nullptr;
  fiber_switch(&dropped, &scheduler);
  __builtin_unreachable();
}

bool run_blocks(const std::vector<Block*>& blocks) {
  ready.clear();
  ready_head = 0;
  abandoned = false;
  yields = 0;
  int64_t live = 0;
  for (Block* b : blocks) {
    for (Warp& w : b->warp) enqueue(&w);
  }
  running = &blocks;
  while (ready_head < ready.size() || complete_any()) {
    if (ready_head == ready.size()) continue;
    Warp* w = next_warp();
    w->runnable |= w->polling;
    w->polling = 0;
    if (w->runnable == 0) continue;
    const int lane = __builtin_ctz(w->runnable);
    w->runnable &= w->runnable - 1;
    current = &w->lanes[lane];
    fiber_switch(&scheduler, &current->fiber);  // comes back when none of its lanes can run
    if (abandoned) return false;
  }
  for (Block* b : blocks) {
    live += b->live;
    for (Warp& w : b->warp) w.accesses.settle();
  }
  if (live != 0) report_deadlock(blocks);
  return live == 0;
}

// --- lives ---------------------------------------------------------------------------------------

namespace {

const std::function<void()>* kernel;

void thread_main() {
  (*kernel)();
  Thread* self = current;
  Block& b = *self->block;
  plain_access_at = nullptr;
  if (!self->copies.copies.empty()) report(Site{}, "exits with a cp.async it hasn't waited for");
  check_bulk_stores_at_exit(*self);
  check_products_at_exit(*self);
  self->exited = true;
  --b.live;
  forget_exited_thread(b);
  leave(self);
  __builtin_unreachable();
}

}  // namespace

constexpr size_t kIdsBytes = 64;
static_assert(sizeof(ThreadIds) <= kIdsBytes);

void start_block(Block& b, int64_t index, const std::function<void()>& body, unsigned char* stacks,
                 size_t stack_bytes) {
  kernel = &body;
  b.index = index;
  b.live = b.threads;
  for (Barrier& barrier : b.barrier) barrier = Barrier();
  b.mbarriers.clear();
  b.async = AsyncProxy();
  for (int i = 0; i < b.threads; ++i) {
    Thread& t = b.thread[i];
    unsigned char* stack = stacks + i * stack_bytes;
    t = Thread();
    t.block = &b;
    t.warp = &b.warp[i / 32];
    t.id = i;
    t.lane = i % 32;
    t.ids = reinterpret_cast<ThreadIds*>(stack + stack_bytes - kIdsBytes);
    fiber_prepare(&t.fiber, stack, reinterpret_cast<unsigned char*>(t.ids) - stack, thread_main);
  }
  for (size_t i = 0; i < b.warp.size(); ++i) {
    Warp& w = b.warp[i];
    w = Warp();
    w.block = &b;
    w.lanes = &b.thread[32 * i];
    w.runnable = 0xffffffffu;
  }
  start_warpgroups(b);
  enter_era(b);
  if (options().races) b.shadow.reset("shared memory", b.shared_bytes, false);
}

void access_shared(Thread& t, const void* p, size_t bytes, Access access, const char* what,
                   Site site) {
  Block& b = *t.block;
  const auto offset = static_cast<const unsigned char*>(p) - b.shared;
  if (offset < 0 || offset + static_cast<int64_t>(bytes) > b.shared_bytes) {
    fail(site, "%s of %zu bytes at byte %td of shared memory, which has %d", what, bytes, offset,
         b.shared_bytes);
  }
  note_banks(t, offset, bytes, what, site);
  if (options().races) b.shadow.access(offset, bytes, access, observer(t), what, site);
}

void note_banks(const Thread& t, std::ptrdiff_t offset, size_t bytes, const char* what, Site site) {
  if (!options().banks) return;
  const void* pc = site.file == nullptr ? plain_access_at : nullptr;
  t.warp->accesses.note(t.lane, offset, bytes, what, site, pc);
}

void advance_clock(Thread& t) {
  if (++t.clock >> kClockBits != 0) {
    fail(Site{}, "too many fences and barriers without one of the whole block: use races=0");
  }
}

const ThreadIds& ids() { return *current->ids; }
unsigned char* shared_memory() { return current->block->shared; }
void yield() { yield_thread(); }

}  // namespace emulator
