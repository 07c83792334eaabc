// Copies and atomics. A cp_async happens at the cp_async_wait of the thread that asked for it, and
// until then its destination holds NaN: a kernel that forgets to wait shows it.
#pragma once

#include <cstring>
#include <string>

#include "machine.h"

namespace dendrite {
namespace emulator {

inline void check_16(const void* address, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0)
    machine.fail(std::string(what) + ": the address is no multiple of 16");
}

inline void check_global(const void* address, const char* what) {
  if (machine.is_shared(address))
    machine.fail(std::string(what) + ": the address of global memory lies in shared memory");
}

// Lets the copies [0, end) of a thread happen.
inline void finish_copies(Fiber& fiber, uint32_t end) {
  for (uint32_t i = 0; i < end; ++i) {
    const Copy& copy = fiber.copies[i];
    char bytes[16] = {};
    if (copy.valid > 0) std::memcpy(bytes, copy.from, size_t(copy.valid));
    std::memcpy(copy.to, bytes, 16);
  }
  fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + end);
}

}  // namespace emulator

inline void cp_async_16(void* smem, const void* gmem, int valid_bytes) {
  using emulator::machine;
  char* to = static_cast<char*>(smem);
  if (valid_bytes < 0 || valid_bytes > 16)
    machine.fail("cp_async_16: valid_bytes is " + std::to_string(valid_bytes));
  emulator::check_16(smem, "cp_async_16 into shared memory");
  emulator::check_16(gmem, "cp_async_16 from global memory");
  if (!machine.is_shared(to, 16))
    machine.fail("cp_async_16: destination at byte " +
                 std::to_string(to - machine.shared_memory()) + " of shared memory, which has " +
                 std::to_string(machine.shared_bytes()) + " bytes");
  emulator::check_global(gmem, "cp_async_16");
  std::memset(to, 0xff, 16);
  machine.current().copies.push_back({to, static_cast<const char*>(gmem), valid_bytes});
}

inline void cp_async_commit() {
  emulator::Fiber& fiber = emulator::machine.current();
  fiber.groups.push_back(uint32_t(fiber.copies.size()));
}

template <int N>
inline void cp_async_wait() {
  static_assert(N >= 0);
  emulator::Fiber& fiber = emulator::machine.current();
  if (fiber.groups.size() <= N) return;
  const size_t done = fiber.groups.size() - N;
  const uint32_t end = fiber.groups[done - 1];
  emulator::finish_copies(fiber, end);
  fiber.groups.erase(fiber.groups.begin(), fiber.groups.begin() + ptrdiff_t(done));
  for (uint32_t& group : fiber.groups) group -= end;
}

inline uint4 load_16(const void* memory) {
  emulator::check_16(memory, "load_16");
  uint4 out;
  std::memcpy(&out, memory, 16);
  return out;
}
inline uint4 load_global_16(const void* gmem) {
  emulator::check_16(gmem, "load_global_16");
  emulator::check_global(gmem, "load_global_16");
  return load_16(gmem);
}
inline void store_16(void* memory, uint4 value) {
  emulator::check_16(memory, "store_16");
  std::memcpy(memory, &value, 16);
}

inline int atomic_add(int* address, int value) {
  const int old = *address;
  *address = old + value;
  return old;
}
inline void thread_fence() {}
inline int load_volatile(const int* address) { return *static_cast<const volatile int*>(address); }
inline int load_acquire(const int* address) { return load_volatile(address); }
inline void grid_dependency_wait() {}
inline void grid_dependency_launch() {}

}  // namespace dendrite
