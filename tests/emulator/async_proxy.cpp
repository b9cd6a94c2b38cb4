#include "async_proxy.h"

#include "block.h"
#include "options.h"
#include "planted_fault.h"

namespace emulator {

Agent new_copy_agent(Block& b) {
  const uint32_t n = b.async.copies++;
  return {kFirstAgent + kMostWarpgroups + static_cast<int>(n % kCopyAgents), n / kCopyAgents + 1};
}

void start_operation(Block& b, AsyncProxy::Operation operation) {
  b.async.used = true;
  if (options().completion == Completion::kEager) {
    operation.carry_out();
  } else {
    b.async.pending.push_back(std::move(operation));
  }
}

bool complete_one(Block& b) {
  auto& pending = b.async.pending;
  if (pending.empty()) return false;
  size_t next = options().seed != 0 ? random_bits() % pending.size() : 0;
  if (const int queue = pending[next].queue; queue != AsyncProxy::kNoQueue) {
    for (next = 0; pending[next].queue != queue;) ++next;
  }
  const auto carry_out = std::move(pending[next].carry_out);
  pending.erase(pending.begin() + static_cast<std::ptrdiff_t>(next));
  carry_out();
  return true;
}

Observer observer(const Block& b, Agent agent, const Clock* known, const Clock* async) {
  return {b.era, agent.id, agent.clock, known, async};
}

void fence_proxy_async(Site site) {
  if (!options().races || is_left_out(site)) return;
  Thread& t = *current;
  Clock fenced;
  if (t.known.own != nullptr) fenced = *t.known.own;
  if (fenced.size() <= static_cast<size_t>(t.id)) fenced.resize(t.id + 1);
  fenced[t.id] = t.clock;
  t.known.async = std::make_shared<const Clock>(std::move(fenced));
  advance_clock(t);
}

}  // namespace emulator
