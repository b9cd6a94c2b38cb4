// Address ranges of the fibers' stacks and of the blocks' shared memory. Each kind lies in one
// range, so that what an address belongs to is one comparison away.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

constexpr size_t kStackBytes = 256 << 10;    // of it the lowest page is a guard
constexpr size_t kSharedStride = 256 << 10;  // from one block's shared memory to the next's

struct AddressRange {
  uintptr_t begin = 0;
  size_t bytes = 0;
  bool holds(const void* p) const { return reinterpret_cast<uintptr_t>(p) - begin < bytes; }
};
extern AddressRange stack_range, shared_range;

unsigned char* reserve_stacks(int64_t count);
unsigned char* reserve_shared(int64_t count);

}  // namespace emulator
