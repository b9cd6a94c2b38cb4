#include "fiber.h"

#include <cstdint>

namespace emulator {

#ifdef FASTATTN_EMULATOR_UCONTEXT

void fiber_prepare(Fiber* fiber, unsigned char* stack, size_t bytes, void (*entry)()) {
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = stack;
  fiber->context.uc_stack.ss_size = bytes;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, entry, 0);
}

void fiber_switch(Fiber* from, Fiber* to) { swapcontext(&from->context, &to->context); }

#else

// The System V ABI's callee-saved registers lie on the stack, below them the address to return to.
// (The control words of x87 and SSE are the same on every fiber.)
extern "C" __attribute__((visibility("hidden"))) void emulator_fiber_switch(void** from, void* to);
asm(R"(
  .text
  .globl emulator_fiber_switch
  .hidden emulator_fiber_switch
  .type emulator_fiber_switch, @function
emulator_fiber_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size emulator_fiber_switch, . - emulator_fiber_switch
)");

void fiber_prepare(Fiber* fiber, unsigned char* stack, size_t bytes, void (*entry)()) {
  // On entry to a function the stack pointer is 8 short of a multiple of 16. Six registers (zeros),
  // `entry` to return to, and one word that stands for its caller.
  auto* top = reinterpret_cast<uintptr_t*>(reinterpret_cast<uintptr_t>(stack + bytes) & ~15ull);
  for (int i = 1; i <= 8; ++i) top[-i] = 0;
  top[-2] = reinterpret_cast<uintptr_t>(entry);
  fiber->stack_pointer = top - 8;
}

void fiber_switch(Fiber* from, Fiber* to) {
  emulator_fiber_switch(&from->stack_pointer, to->stack_pointer);
}

#endif

}  // namespace emulator
