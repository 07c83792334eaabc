// Stacks of their own, and the switch between them: a function of a few instructions on x86-64 and
// aarch64, ucontext elsewhere.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "cuda_names.h"

#if !defined(__x86_64__) && !defined(__aarch64__)
#define DENDRITE_UCONTEXT 1
#include <ucontext.h>
#endif

namespace dendrite::emulator {

#ifdef DENDRITE_UCONTEXT

struct Context {
  ucontext_t state;
};
inline void switch_context(Context* from, Context* to) { swapcontext(&from->state, &to->state); }
inline void prepare(Context* context, char* bottom, size_t size, void (*entry)()) {
  getcontext(&context->state);
  context->state.uc_stack.ss_sp = bottom;
  context->state.uc_stack.ss_size = size;
  context->state.uc_link = nullptr;
  makecontext(&context->state, entry, 0);
}

#else

// Saves the registers that a call keeps on the running stack, and goes on where `load` was saved.
extern "C" void dendrite_switch_stack(void** save, void* load) asm("dendrite_switch_stack");

#if defined(__x86_64__)
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
constexpr size_t kSavedBytes = 6 * 8 + 8, kEntryOffset = 6 * 8;
constexpr size_t kAbove = 8;  // entered like a function that was called: 8 bytes below a multiple of 16
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
constexpr size_t kSavedBytes = 160, kEntryOffset = 88, kAbove = 0;
#endif

struct Context {
  void* stack_pointer;
};
inline void switch_context(Context* from, Context* to) {
  dendrite_switch_stack(&from->stack_pointer, to->stack_pointer);
}
inline void prepare(Context* context, char* bottom, size_t size, void (*entry)()) {
  char* top = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(bottom + size) & ~uintptr_t(15));
  char* saved = top - 16 - kAbove - kSavedBytes;
  std::memset(saved, 0, size_t(top - saved));
  const uintptr_t target = reinterpret_cast<uintptr_t>(entry);
  std::memcpy(saved + kEntryOffset, &target, sizeof target);
  context->stack_pointer = saved;
}

#endif

// Stacks with an unmapped page below each, taken as they are needed and kept.
class Stacks {
 public:
  static constexpr size_t kBytes = size_t(1) << 18;
  static constexpr size_t kMost = 1024;

  // Lowest usable byte and size of stack `index`. Tops are shifted against one another: at the same
  // offset from a page, the stacks of a block would fight for the same few cache lines.
  char* bottom(size_t index) {
    if (base_ == nullptr) reserve();
    return base_ + index * kBytes + page();
  }
  size_t size(size_t index) const { return kBytes - page() - (index % 61) * 320; }

 private:
  static size_t page() { return size_t(sysconf(_SC_PAGESIZE)); }
  void reserve() {
    void* memory = mmap(nullptr, kBytes * kMost, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("emulator: no memory for stacks");
    base_ = static_cast<char*>(memory);
    for (size_t i = 0; i < kMost; ++i) mprotect(base_ + i * kBytes, page(), PROT_NONE);
  }
  char* base_ = nullptr;
};

}  // namespace dendrite::emulator
