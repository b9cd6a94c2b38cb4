#include "global_shadow.h"

#include <unordered_map>

#include "block.h"
#include "report.h"

namespace emulator {

void GlobalShadow::reset(const char* name, size_t bytes) {
  name_ = name;
  within_block_.reset(name, bytes, true);
  between_blocks_.assign((bytes + kBytes - 1) / kBytes, Halfword());
}

void GlobalShadow::access(Thread& t, size_t offset, size_t bytes, Access access, const char* what,
                          Site site) {
  within_block_.access(offset, bytes, access, observer(t), what, site);
  const Past now{static_cast<uint32_t>(t.block->index + 1), t.block->era, make_stamp(t.id, t.clock),
                 access == Access::kAtomic};
  const auto unordered = [&](const Past& past) {
    if (past.block == 0 || past.block == now.block || (past.atomic && now.atomic)) return false;
    if (t.known.others == nullptr) return true;
    const auto found = t.known.others->find(past.block - 1);
    if (found == t.known.others->end()) return true;
    const BlockProgress& known = found->second;
    if (known.era != past.era) return known.era < past.era;
    const size_t thread = stamp_thread(past.stamp);
    return thread >= known.clock.size() || known.clock[thread] < stamp_clock(past.stamp);
  };
  const Past* race = nullptr;
  Past found;
  const char* with = "";
  for (size_t i = offset / kBytes; i * kBytes < offset + bytes; ++i) {
    Halfword& h = between_blocks_[i];
    if (race == nullptr && unordered(h.write)) {
      race = &(found = h.write);
      with = "write";
    }
    if (access == Access::kRead) {
      h.read_by_many = h.read_by_many || (h.read.block != 0 && h.read.block != now.block);
      h.read = now;
      continue;
    }
    const bool others_read = h.read_by_many || h.read.block != now.block;
    if (race == nullptr && others_read && unordered(h.read)) {
      race = &(found = h.read);
      with = "read";
    }
    h.write = now;
    h.read = Past();
    h.read_by_many = false;
  }
  if (race != nullptr) {
    report(site, "race: %s of byte %zu of %s isn't ordered after the %s of block %u, thread %d",
           what, offset, name_, with, race->block - 1, stamp_thread(race->stamp));
  }
}

// --- order between blocks ------------------------------------------------------------------------

namespace {

std::unordered_map<uintptr_t, OtherBlocks> published;  // at the address of an atomic

}  // namespace

void fence(Thread& t) {
  Join join;
  join.add(t.known, t.id, t.clock);
  advance_clock(t);
  if (t.known.acquired != nullptr) {
    join.add_others({nullptr, t.known.acquired, nullptr, nullptr});
    const auto own = t.known.acquired->find(t.block->index);
    if (own != t.known.acquired->end() && own->second.era == t.block->era) {
      join.add({std::make_shared<const Clock>(own->second.clock), nullptr, nullptr, nullptr}, t.id,
               0);
    }
  }
  t.known = join.take();
  t.known.acquired = nullptr;
  OtherBlocks all;
  if (t.known.others != nullptr) all = *t.known.others;
  all[t.block->index] = {t.block->era, *t.known.own};
  t.known.fenced = std::make_shared<const OtherBlocks>(std::move(all));
}

void synchronise_through_atomic(Thread& t, const void* p) {
  OtherBlocks& there = published[reinterpret_cast<uintptr_t>(p)];
  if (!there.empty()) {
    OtherBlocks acquired = there;
    if (t.known.acquired != nullptr) join(&acquired, *t.known.acquired);
    t.known.acquired = std::make_shared<const OtherBlocks>(std::move(acquired));
  }
  if (t.known.fenced != nullptr) join(&there, *t.known.fenced);
}

void forget_synchronisation() { published.clear(); }

}  // namespace emulator
