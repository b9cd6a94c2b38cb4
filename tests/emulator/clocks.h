// Vector clocks: what a thread knows of the others' progress, that is which of their accesses are
// ordered before its own.
//
// The life of a block is cut into eras by the barriers that all its threads wait at: what happened
// in an earlier era is known to everyone. Within an era each thread counts its releases, from 1,
// and `Knowledge` says up to which count a thread knows each other one. Threads that met at a
// barrier share one immutable clock, so that passing barriers is cheap.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

namespace emulator {

using Clock = std::vector<uint32_t>;  // [thread of the block] → count; no clock is all zeros

// A moment of a thread, within an era.
constexpr int kClockBits = 20;
constexpr uint32_t make_stamp(int thread, uint32_t clock) {
  return static_cast<uint32_t>(thread) << kClockBits | clock;
}
constexpr int stamp_thread(uint32_t stamp) { return static_cast<int>(stamp >> kClockBits); }
constexpr uint32_t stamp_clock(uint32_t stamp) { return stamp & ((1u << kClockBits) - 1); }

inline void join(Clock* into, const Clock& other) {
  if (into->size() < other.size()) into->resize(other.size());
  for (size_t i = 0; i < other.size(); ++i) (*into)[i] = std::max((*into)[i], other[i]);
}

// What is known of another block of the launch: everything before `era`, and of that era `clock`.
struct BlockProgress {
  uint32_t era = 0;
  Clock clock;
};
using OtherBlocks = std::map<int64_t, BlockProgress>;  // [block of the grid]

inline void join(BlockProgress* into, const BlockProgress& other) {
  if (into->era < other.era) {
    *into = other;
  } else if (into->era == other.era) {
    join(&into->clock, other.clock);
  }
}
inline void join(OtherBlocks* into, const OtherBlocks& other) {
  for (const auto& [block, progress] : other) join(&(*into)[block], progress);
}

struct Knowledge {
  std::shared_ptr<const Clock> own;  // of the thread's block, in its current era
  // Null in most kernels, as blocks seldom talk. A fence makes `fenced` of all that is known, an
  // atomic publishes that and adds what it finds to `acquired`, the next fence makes it known.
  std::shared_ptr<const OtherBlocks> others, fenced, acquired;
  // What of `own` copies and products that run asynchronously may rely on as written: what they
  // have written themselves, and what was there before a fence.proxy.async.
  std::shared_ptr<const Clock> async{};
};

// Collects what several threads know.
class Join {
 public:
  // `thread` of the block releases: what it knows, and itself up to `clock`.
  void add(const Knowledge& known, int thread, uint32_t clock) {
    add(known);
    add_to(&own_, thread, clock);
  }
  void add(const Knowledge& known) {
    add_once(&own_, known.own, &last_);
    add_once(&async_, known.async, &last_async_);
    add_others(known);
  }
  // What an asynchronous operation has done.
  void add_async(int agent, uint32_t clock) {
    add_to(&own_, agent, clock);
    add_to(&async_, agent, clock);
  }
  void add_others(const Knowledge& known) {
    others_.add(known.others);
    fenced_.add(known.fenced);
    acquired_.add(known.acquired);
  }
  void forget_own() {  // a new era: all of it is known
    own_.clear(), last_ = nullptr;
    async_.clear(), last_async_ = nullptr;
  }

  Knowledge take() {
    Knowledge result;
    if (!own_.empty()) result.own = std::make_shared<const Clock>(std::move(own_));
    if (!async_.empty()) result.async = std::make_shared<const Clock>(std::move(async_));
    result.others = others_.take();
    result.fenced = fenced_.take();
    result.acquired = acquired_.take();
    *this = Join();
    return result;
  }

 private:
  static void add_to(Clock* clock, int thread, uint32_t count) {
    if (clock->size() <= static_cast<size_t>(thread)) clock->resize(thread + 1);
    (*clock)[thread] = std::max((*clock)[thread], count);
  }
  static void add_once(Clock* clock, const std::shared_ptr<const Clock>& other,
                       std::shared_ptr<const Clock>* last) {
    if (other == nullptr || other == *last) return;
    *last = other;
    join(clock, *other);
  }

  struct Others {
    OtherBlocks joined;
    std::shared_ptr<const OtherBlocks> last;

    void add(const std::shared_ptr<const OtherBlocks>& other) {
      if (other == nullptr || other == last) return;
      last = other;
      join(&joined, *other);
    }
    std::shared_ptr<const OtherBlocks> take() {
      if (joined.empty()) return nullptr;
      return std::make_shared<const OtherBlocks>(std::move(joined));
    }
  };

  Clock own_, async_;
  // Just added: joining it again changes nothing. Held, so that no other one takes its address.
  std::shared_ptr<const Clock> last_, last_async_;
  Others others_, fenced_, acquired_;
};

}  // namespace emulator
