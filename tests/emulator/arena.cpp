#include "arena.h"

#include <sys/mman.h>

#include <new>

namespace emulator {

AddressRange stack_range, shared_range;

namespace {

// Pages are taken from the system as they are touched, and kept for the launches that follow.
bool grow(AddressRange* range, size_t bytes) {
  if (range->bytes >= bytes) return false;
  if (range->bytes != 0) munmap(reinterpret_cast<void*>(range->begin), range->bytes);
  *range = AddressRange();
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  *range = {reinterpret_cast<uintptr_t>(p), bytes};
  return true;
}

}  // namespace

unsigned char* reserve_stacks(int64_t count) {
  constexpr int64_t kGuarded = 4096;  // the system allows some 65,000 mappings
  if (grow(&stack_range, count * kStackBytes)) {
    for (int64_t i = 0; i < count && i < kGuarded; ++i) {
      mprotect(reinterpret_cast<unsigned char*>(stack_range.begin) + i * kStackBytes, 4096,
               PROT_NONE);
    }
  }
  return reinterpret_cast<unsigned char*>(stack_range.begin);
}

// Aligned to a page, hence to the 1024 bytes that swizzled tiles want.
unsigned char* reserve_shared(int64_t count) {
  grow(&shared_range, count * kSharedStride);
  return reinterpret_cast<unsigned char*>(shared_range.begin);
}

}  // namespace emulator
