// What is remembered of each 4-byte word of memory: who of a block wrote it, who has read it since,
// whether a copy to it is in flight. An access that isn't ordered after those it conflicts
// with is a race, whatever order this run happened to take.
//
// Where threads touch single bytes of a word (16-bit elements), each of its bytes gets a record.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "clocks.h"
#include "site.h"

namespace emulator {

// Asynchronous copies and products count as threads from here on.
constexpr int kFirstAgent = 1024;

// A thread as a shadow sees it.
struct Observer {
  uint32_t era;
  int thread;
  uint32_t clock;
  const Clock* known;          // of its block in this era; may be null
  const Clock* known_written;  // what of it has been written for this observer

  bool knows(int other, uint32_t other_clock) const {
    return other == thread || holds(known, other, other_clock);
  }
  bool knows_written(int other, uint32_t other_clock) const {
    return other == thread || holds(known_written, other, other_clock);
  }

 private:
  static bool holds(const Clock* clock, int other, uint32_t other_clock) {
    return clock != nullptr && static_cast<size_t>(other) < clock->size() &&
           (*clock)[other] >= other_clock;
  }
};

// Lanes of one warp that read at the same count of their clocks.
struct Readers {
  uint32_t warp_and_clock;  // as a stamp
  uint32_t lanes;
};

struct Record {
  static constexpr int kReaders = 4;     // a tile is read by as many warps
  uint32_t era = 0;                      // that of writer and readers
  uint32_t writer = 0;                   // stamp; 0: nobody in this era
  uint32_t more = 0;                     // 1 + index of further readers; kSplit + index of bytes
  uint16_t copying = 0;                  // 1 + the thread whose copy to here is in flight
  bool written = false, atomic = false;  // ever; by the writer
  uint8_t readers = 0;
  Readers reader[kReaders];
};

enum class Access { kRead, kWrite, kAtomic };

class Shadow {
 public:
  // `bytes` of memory that reports call `name`. What nobody has written isn't to be read, unless
  // `written`.
  void reset(const char* name, size_t bytes, bool written);

  // `what` accesses [offset, offset + bytes); reports races and reads of what nobody wrote. Atomics
  // aren't ordered among each other.
  void access(size_t offset, size_t bytes, Access access, const Observer& who, const char* what,
              Site site);
  // The same as a write, which lasts until end_copy.
  void begin_copy(size_t offset, size_t bytes, const Observer& who, Site site);
  void end_copy(size_t offset, size_t bytes, const Observer& who);

 private:
  enum class Fault { kNone, kCopying, kUninitialised, kAfterWrite, kUnfenced, kAfterRead };
  struct Verdict {
    Fault fault = Fault::kNone;
    int other = 0;  // thread
  };
  using Bytes = std::array<Record, 4>;
  static constexpr uint32_t kSplit = 1u << 31;

  static bool is_split(const Record& r) { return (r.more & kSplit) != 0; }
  void enter_era(Record* r, uint32_t era);
  Verdict check(Record* r, Access access, const Observer& who);
  void add_reader(Record* r, const Observer& who);
  int unordered_reader(const Record& r, const Observer& who) const;  // or -1
  // Calls body(record) for the words, or bytes of split words, of a range.
  template <class Body>
  void for_each(size_t offset, size_t bytes, const Body& body);

  const char* name_ = "";
  std::vector<Record> words_;
  std::vector<Bytes> bytes_;                   // of split words
  std::vector<std::vector<Readers>> readers_;  // beyond a record's own
};

}  // namespace emulator
