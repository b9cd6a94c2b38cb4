// Races on one buffer of global memory: between threads of a block, and between blocks of a launch.
#pragma once

#include <cstdint>
#include <vector>

#include "shadow.h"

namespace emulator {

struct Thread;

class GlobalShadow {
 public:
  void reset(const char* name, size_t bytes);
  void access(Thread& t, size_t offset, size_t bytes, Access access, const char* what, Site site);

 private:
  // A past access of some block.
  struct Past {
    uint32_t block = 0;  // 1 + its index; 0: none
    uint32_t era, stamp;
    bool atomic;
  };
  // Of 2 bytes. The last of the readers stands for all of them.
  struct Halfword {
    Past write, read;
    bool read_by_many = false;
  };
  static constexpr size_t kBytes = 2;

  const char* name_ = "";
  Shadow within_block_;
  std::vector<Halfword> between_blocks_;
};

// How an order between blocks arises: __threadfence, atomic … atomic, __threadfence.
void fence(Thread& t);
void synchronise_through_atomic(Thread& t, const void* p);
void forget_synchronisation();  // at a launch

}  // namespace emulator
