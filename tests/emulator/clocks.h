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
};

// Collects what several threads know.
class Join {
 public:
  // `thread` of the block releases: what it knows, and itself up to `clock`.
  void add(const Knowledge& known, int thread, uint32_t clock) {
    if (known.own != nullptr && known.own.get() != last_) {
      last_ = known.own.get();
      join(&own_, *known.own);
    }
    if (own_.size() <= static_cast<size_t>(thread)) own_.resize(thread + 1);
    own_[thread] = std::max(own_[thread], clock);
    add_others(known);
  }
  void add_others(const Knowledge& known) {
    others_.add(known.others);
    fenced_.add(known.fenced);
    acquired_.add(known.acquired);
  }
  void forget_own() { own_.clear(), last_ = nullptr; }  // a new era: all of it is known

  Knowledge take() {
    Knowledge result;
    if (!own_.empty()) result.own = std::make_shared<const Clock>(std::move(own_));
    result.others = others_.take();
    result.fenced = fenced_.take();
    result.acquired = acquired_.take();
    *this = Join();
    return result;
  }

 private:
  struct Others {
    OtherBlocks joined;
    const OtherBlocks* last = nullptr;  // just added: joining it again changes nothing

    void add(const std::shared_ptr<const OtherBlocks>& other) {
      if (other == nullptr || other.get() == last) return;
      last = other.get();
      join(&joined, *other);
    }
    std::shared_ptr<const OtherBlocks> take() {
      if (joined.empty()) return nullptr;
      return std::make_shared<const OtherBlocks>(std::move(joined));
    }
  };

  Clock own_;
  const Clock* last_ = nullptr;
  Others others_, fenced_, acquired_;
};

}  // namespace emulator
