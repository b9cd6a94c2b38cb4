#include "shadow.h"

#include <string>

#include "report.h"

namespace emulator {
namespace {

std::string name_of(int thread) {
  if (thread >= kFirstAgent) return "an asynchronous operation";
  return "thread " + std::to_string(thread);
}

}  // namespace

void Shadow::reset(const char* name, size_t bytes, bool written) {
  name_ = name;
  Record fresh;
  fresh.written = written;
  words_.assign((bytes + 3) / 4, fresh);
  bytes_.clear();
  readers_.clear();
}

// In a new era everything before is ordered; that something was written stays, and copies fly on.
void Shadow::enter_era(Record* r, uint32_t era) {
  r->era = era;
  r->writer = 0;
  r->readers = 0;
  if (!is_split(*r) && r->more != 0) readers_[r->more - 1].clear();
}

void Shadow::add_reader(Record* r, const Observer& who) {
  const uint32_t key = make_stamp(who.thread / 32, who.clock), lane = 1u << who.thread % 32;
  for (int i = 0; i < r->readers; ++i) {
    if (r->reader[i].warp_and_clock == key) {
      r->reader[i].lanes |= lane;
      return;
    }
  }
  if (r->readers < Record::kReaders) {
    r->reader[r->readers++] = {key, lane};
    return;
  }
  if (r->more == 0) {
    readers_.emplace_back();
    r->more = static_cast<uint32_t>(readers_.size());
  }
  std::vector<Readers>& more = readers_[r->more - 1];
  for (Readers& other : more) {
    if (other.warp_and_clock == key) {
      other.lanes |= lane;
      return;
    }
  }
  more.push_back({key, lane});
}

int Shadow::unordered_reader(const Record& r, const Observer& who) const {
  const auto search = [&](const Readers& readers) {
    for (uint32_t lanes = readers.lanes; lanes != 0; lanes &= lanes - 1) {
      const int thread = stamp_thread(readers.warp_and_clock) * 32 + __builtin_ctz(lanes);
      if (!who.knows(thread, stamp_clock(readers.warp_and_clock))) return thread;
    }
    return -1;
  };
  for (int i = 0; i < r.readers; ++i) {
    if (const int thread = search(r.reader[i]); thread >= 0) return thread;
  }
  if (r.more != 0) {
    for (const Readers& readers : readers_[r.more - 1]) {
      if (const int thread = search(readers); thread >= 0) return thread;
    }
  }
  return -1;
}

Shadow::Verdict Shadow::check(Record* r, Access access, const Observer& who) {
  if (r->era != who.era) enter_era(r, who.era);
  Verdict verdict;
  if (r->copying != 0) {
    verdict = {Fault::kCopying, r->copying - 1};
  } else if (r->writer != 0 && !(access == Access::kAtomic && r->atomic) &&
             !who.knows_written(stamp_thread(r->writer), stamp_clock(r->writer))) {
    const bool unfenced = who.knows(stamp_thread(r->writer), stamp_clock(r->writer));
    verdict = {unfenced ? Fault::kUnfenced : Fault::kAfterWrite, stamp_thread(r->writer)};
  }
  if (access == Access::kRead) {
    if (!r->written && verdict.fault == Fault::kNone) verdict = {Fault::kUninitialised, 0};
    add_reader(r, who);
    return verdict;
  }
  if (verdict.fault == Fault::kNone && r->readers != 0) {
    if (const int reader = unordered_reader(*r, who); reader >= 0) {
      verdict = {Fault::kAfterRead, reader};
    }
  }
  enter_era(r, who.era);  // the readers matter no more
  r->writer = make_stamp(who.thread, who.clock);
  r->written = true;
  r->atomic = access == Access::kAtomic;
  return verdict;
}

template <class Body>
void Shadow::for_each(size_t offset, size_t bytes, const Body& body) {
  const size_t end = offset + bytes;
  for (size_t word = offset / 4; word * 4 < end; ++word) {
    Record& r = words_[word];
    const bool whole = word * 4 >= offset && word * 4 + 4 <= end;
    if (whole && !is_split(r)) {
      body(&r);
      continue;
    }
    if (!is_split(r)) {
      Record copy = r;
      bytes_.push_back({copy, copy, copy, copy});
      for (Record& byte : bytes_.back()) {
        if (r.more == 0) break;
        readers_.push_back(std::vector<Readers>(readers_[r.more - 1]));
        byte.more = static_cast<uint32_t>(readers_.size());
      }
      r.more = kSplit | static_cast<uint32_t>(bytes_.size() - 1);
    }
    const uint32_t index = r.more & ~kSplit;
    for (size_t byte = word * 4; byte < word * 4 + 4; ++byte) {
      if (byte >= offset && byte < end) body(&bytes_[index][byte % 4]);
    }
  }
}

void Shadow::access(size_t offset, size_t bytes, Access access, const Observer& who,
                    const char* what, Site site) {
  Verdict verdict;
  for_each(offset, bytes, [&](Record* r) {
    const Verdict v = check(r, access, who);
    if (verdict.fault == Fault::kNone) verdict = v;
  });
  switch (verdict.fault) {
    case Fault::kNone:
      break;
    case Fault::kCopying:
      report(site, "%s touches byte %zu of %s, where a cp.async of thread %d isn't waited for",
             what, offset, name_, verdict.other);
      break;
    case Fault::kUninitialised:
      report(site, "%s reads byte %zu of %s, which nobody has written", what, offset, name_);
      break;
    case Fault::kAfterWrite:
      report(site, "race: %s of byte %zu of %s isn't ordered after the write of %s", what, offset,
             name_, name_of(verdict.other).c_str());
      break;
    case Fault::kUnfenced:
      report(site, "race: %s of byte %zu of %s comes after the write of %s, without a proxy fence",
             what, offset, name_, name_of(verdict.other).c_str());
      break;
    case Fault::kAfterRead:
      report(site, "race: %s of byte %zu of %s isn't ordered after the read of %s", what, offset,
             name_, name_of(verdict.other).c_str());
      break;
  }
}

void Shadow::begin_copy(size_t offset, size_t bytes, const Observer& who, Site site) {
  access(offset, bytes, Access::kWrite, who, "cp.async", site);
  for_each(offset, bytes, [&](Record* r) { r->copying = static_cast<uint16_t>(who.thread + 1); });
}

void Shadow::end_copy(size_t offset, size_t bytes, const Observer& who) {
  for_each(offset, bytes, [&](Record* r) {
    if (r->era != who.era) enter_era(r, who.era);
    r->copying = 0;
    r->writer = make_stamp(who.thread, who.clock);
  });
}

}  // namespace emulator
