// Stacks of their own, and the switch between them: a function of a few instructions on x86-64 and
// aarch64, ucontext elsewhere. AddressSanitizer is told of every switch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cuda_names.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define DENDRITE_SANITIZE 1
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define DENDRITE_SANITIZE 1
#endif
#ifdef DENDRITE_SANITIZE
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) && !defined(__aarch64__)
#define DENDRITE_UCONTEXT 1
#endif
#ifdef DENDRITE_UCONTEXT
#include <ucontext.h>
#else
// Saves the registers that a call keeps on the running stack, and goes on where `load` was saved.
// Every translation unit has its own, so the name is never seen by the linker.
extern "C" void dendrite_switch_stack(void** save, void* load) asm("dendrite_switch_stack");
#endif

#ifdef DENDRITE_UCONTEXT
#elif defined(__x86_64__)
asm(R"(
  .text
  .p2align 4
dendrite_switch_stack:
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
)");
#else
asm(R"(
  .text
  .p2align 4
dendrite_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
#endif

namespace dendrite::emulator {

// Where a fiber (or the thread that started them all) goes on, and its stack.
struct Context {
#ifdef DENDRITE_UCONTEXT
  ucontext_t state{};
#else
  void* stack_pointer = nullptr;
#endif
  const void* bottom = nullptr;
  size_t size = 0;
};

#ifdef DENDRITE_SANITIZE
DENDRITE_HIDDEN inline Context* switched_from = nullptr;

inline void announce_switch(void** fake, Context* from, const Context* to) {
  switched_from = from;
  __sanitizer_start_switch_fiber(fake, to->bottom, to->size);
}
// Called first on the new stack; learns the bounds of the old one, which may be a thread's own.
inline void finish_switch(void* fake) {
  __sanitizer_finish_switch_fiber(fake, &switched_from->bottom, &switched_from->size);
}
inline void clean_stack(const Context& context) {
  __asan_unpoison_memory_region(context.bottom, context.size);
}
#else
inline void announce_switch(void**, Context*, const Context*) {}
inline void finish_switch(void*) {}
inline void clean_stack(const Context&) {}
#endif

inline void switch_context(Context* from, Context* to) {
  void* fake = nullptr;
  announce_switch(&fake, from, to);
#ifdef DENDRITE_UCONTEXT
  swapcontext(&from->state, &to->state);
#else
  dendrite_switch_stack(&from->stack_pointer, to->stack_pointer);
#endif
  finish_switch(fake);
}

// Makes a context that starts with entry(), which calls finish_switch(nullptr) and doesn't return.
inline void prepare(Context* context, char* bottom, size_t size, void (*entry)()) {
  context->bottom = bottom;
  context->size = size;
  clean_stack(*context);
#ifdef DENDRITE_UCONTEXT
  getcontext(&context->state);
  context->state.uc_stack.ss_sp = bottom;
  context->state.uc_stack.ss_size = size;
  context->state.uc_link = nullptr;
  makecontext(&context->state, entry, 0);
#else
#if defined(__x86_64__)
  // Entered as by a call: 8 bytes, the address to return to, below a multiple of 16.
  constexpr size_t saved = 6 * 8 + 8, entry_at = 6 * 8, above = 8;
#else
  constexpr size_t saved = 160, entry_at = 88, above = 0;
#endif
  const uintptr_t end = reinterpret_cast<uintptr_t>(bottom) + size;
  char* top = bottom + size - end % 16;
  char* frame = top - 16 - above - saved;
  const uintptr_t target = reinterpret_cast<uintptr_t>(entry);
  std::memset(frame, 0, size_t(top - frame));
  std::memcpy(frame + entry_at, &target, sizeof target);
  context->stack_pointer = frame;
#endif
}

}  // namespace dendrite::emulator
