// Plain loads and stores of a kernel. Its translation unit is compiled with -fsanitize=thread,
// which calls a function before each of them; instead of ThreadSanitizer's run time we supply these
// functions.
#include <cstddef>
#include <cstdint>

#include "arena.h"
#include "block.h"
#include "global_memory.h"
#include "global_shadow.h"
#include "options.h"
#include "report.h"

namespace emulator {

// The beginning of what gcc and clang describe a misaligned access with.
struct TypeMismatch {
  const char* file;
  uint32_t line, column;
  const void* type;
  unsigned char log_alignment;
};

namespace {

void outside_stack(const void* p, size_t bytes, Access access, const char* what, const void* pc) {
  Thread& t = *current;
  plain_access_at = pc;
  if (static_cast<size_t>(static_cast<const unsigned char*>(p) - t.block->shared) < kSharedStride) {
    access_shared(t, p, bytes, access, what, Site{});
  } else {
    access_global(t, p, bytes, access, what, Site{});
  }
}

inline void hook(const void* p, size_t bytes, Access access, const char* what, const void* pc) {
  if (current != nullptr && !stack_range.holds(p)) outside_stack(p, bytes, access, what, pc);
}

// A flag that other threads set or read meanwhile: as if by atomics.
void volatile_hook(const void* p, size_t bytes, const char* what, const void* pc) {
  if (current == nullptr || stack_range.holds(p)) return;
  if (options().co_scheduled) yield_thread();  // not between here and the access itself
  outside_stack(p, bytes, Access::kAtomic, what, pc);
  if (options().races) synchronise_through_atomic(*current, p);
}

}  // namespace
}  // namespace emulator

using emulator::Access;
#define EMULATOR_PC __builtin_return_address(0)
#define EMULATOR_HOOKS_OF(bytes, unaligned)                           \
  void __tsan_##unaligned##read##bytes(void* p) {                     \
    emulator::hook(p, bytes, Access::kRead, "load", EMULATOR_PC);     \
  }                                                                   \
  void __tsan_##unaligned##write##bytes(void* p) {                    \
    emulator::hook(p, bytes, Access::kWrite, "store", EMULATOR_PC);   \
  }                                                                   \
  void __tsan_##unaligned##volatile_read##bytes(void* p) {            \
    emulator::volatile_hook(p, bytes, "volatile load", EMULATOR_PC);  \
  }                                                                   \
  void __tsan_##unaligned##volatile_write##bytes(void* p) {           \
    emulator::volatile_hook(p, bytes, "volatile store", EMULATOR_PC); \
  }
#define EMULATOR_HOOKS(bytes) EMULATOR_HOOKS_OF(bytes, ) EMULATOR_HOOKS_OF(bytes, unaligned_)

extern "C" {
EMULATOR_HOOKS(1)
EMULATOR_HOOKS(2)
EMULATOR_HOOKS(4)
EMULATOR_HOOKS(8)
EMULATOR_HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) {
  emulator::hook(p, bytes, Access::kRead, "load", EMULATOR_PC);
}
void __tsan_write_range(void* p, size_t bytes) {
  emulator::hook(p, bytes, Access::kWrite, "store", EMULATOR_PC);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}

// Atomics of C++, which host code has in the same translation unit: local statics, shared pointers.
#define EMULATOR_ATOMICS(bits)                                                                \
  using u##bits = uint##bits##_t;                                                             \
  u##bits __tsan_atomic##bits##_load(const u##bits* p, int) {                                 \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                              \
  }                                                                                           \
  void __tsan_atomic##bits##_store(u##bits* p, u##bits x, int) {                              \
    __atomic_store_n(p, x, __ATOMIC_SEQ_CST);                                                 \
  }                                                                                           \
  u##bits __tsan_atomic##bits##_exchange(u##bits* p, u##bits x, int) {                        \
    return __atomic_exchange_n(p, x, __ATOMIC_SEQ_CST);                                       \
  }                                                                                           \
  u##bits __tsan_atomic##bits##_fetch_add(u##bits* p, u##bits x, int) {                       \
    return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST);                                        \
  }                                                                                           \
  u##bits __tsan_atomic##bits##_fetch_sub(u##bits* p, u##bits x, int) {                       \
    return __atomic_fetch_sub(p, x, __ATOMIC_SEQ_CST);                                        \
  }                                                                                           \
  int __tsan_atomic##bits##_compare_exchange_strong(u##bits* p, u##bits* old, u##bits x, int, \
                                                    int) {                                    \
    return __atomic_compare_exchange_n(p, old, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }
EMULATOR_ATOMICS(8)
EMULATOR_ATOMICS(32)
EMULATOR_ATOMICS(64)

// -fsanitize=alignment calls this where a pointer isn't aligned to its type: a GPU would fault.
void __ubsan_handle_type_mismatch_v1(const emulator::TypeMismatch* data, void* p) {
  if (emulator::current == nullptr) return;
  emulator::fail(emulator::Site{data->file, static_cast<int>(data->line)},
                 "%p isn't aligned to the %d bytes of what is accessed there", p,
                 1 << data->log_alignment);
}
}
