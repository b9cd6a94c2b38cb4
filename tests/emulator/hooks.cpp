// Plain loads and stores of a kernel. Its translation unit is compiled with -fsanitize=thread,
// which calls a function before each of them; instead of ThreadSanitizer's run time we supply these
// functions.
#include <dlfcn.h>
#include <pthread.h>

#include <cstddef>
#include <cstdint>

#include "arena.h"
#include "block.h"
#include "global_memory.h"
#include "report.h"

namespace emulator {
namespace {

// Kernel parameters are copied from the host's stack, constants are read where the loader put them.
bool is_constant(const void* p) {
  static thread_local AddressRange host_stack = [] {
    pthread_attr_t attributes;
    void* begin = nullptr;
    size_t bytes = 0;
    if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
      pthread_attr_getstack(&attributes, &begin, &bytes);
      pthread_attr_destroy(&attributes);
    }
    return AddressRange{reinterpret_cast<uintptr_t>(begin), bytes};
  }();
  Dl_info info;
  return host_stack.holds(p) || dladdr(p, &info) != 0;
}

void outside_stack(const void* p, size_t bytes, bool write) {
  Thread& t = *current;
  const char* what = write ? "store" : "load";
  if (static_cast<size_t>(static_cast<const unsigned char*>(p) - t.block->shared) < kSharedStride) {
    access_shared(t, p, bytes, write ? Access::kWrite : Access::kRead, what, Site{});
  } else if (write || !is_constant(p)) {
    access_global(t, p, bytes, write ? GlobalAccess::kWrite : GlobalAccess::kRead, what, Site{});
  }
}

inline void hook(const void* p, size_t bytes, bool write) {
  if (current != nullptr && !stack_range.holds(p)) outside_stack(p, bytes, write);
}

}  // namespace
}  // namespace emulator

#define EMULATOR_HOOKS(bytes)                                                              \
  void __tsan_read##bytes(void* p) { emulator::hook(p, bytes, false); }                    \
  void __tsan_write##bytes(void* p) { emulator::hook(p, bytes, true); }                    \
  void __tsan_unaligned_read##bytes(void* p) { emulator::hook(p, bytes, false); }          \
  void __tsan_unaligned_write##bytes(void* p) { emulator::hook(p, bytes, true); }          \
  void __tsan_volatile_read##bytes(void* p) { emulator::hook(p, bytes, false); }           \
  void __tsan_volatile_write##bytes(void* p) { emulator::hook(p, bytes, true); }           \
  void __tsan_unaligned_volatile_read##bytes(void* p) { emulator::hook(p, bytes, false); } \
  void __tsan_unaligned_volatile_write##bytes(void* p) { emulator::hook(p, bytes, true); }

extern "C" {
EMULATOR_HOOKS(1)
EMULATOR_HOOKS(2)
EMULATOR_HOOKS(4)
EMULATOR_HOOKS(8)
EMULATOR_HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) { emulator::hook(p, bytes, false); }
void __tsan_write_range(void* p, size_t bytes) { emulator::hook(p, bytes, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
}
