// Fibers: functions that run on stacks of their own and hand over to each other by name. One CUDA
// thread is one fiber. A switch costs a few nanoseconds in x86-64 assembly; elsewhere, or with
// FASTATTN_EMULATOR_UCONTEXT, POSIX's ucontext does it in some hundred.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(FASTATTN_EMULATOR_UCONTEXT)
#define FASTATTN_EMULATOR_UCONTEXT
#endif

#ifdef FASTATTN_EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

namespace emulator {

struct Fiber {
#ifdef FASTATTN_EMULATOR_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer;  // while it isn't running; its registers are saved there
#endif
};

// Makes `fiber` call `entry` on the stack [stack, stack + bytes) when first switched to. `entry`
// must not return.
void fiber_prepare(Fiber* fiber, unsigned char* stack, size_t bytes, void (*entry)());

// Saves the running fiber in `from` and goes on with `to`.
void fiber_switch(Fiber* from, Fiber* to);

}  // namespace emulator
