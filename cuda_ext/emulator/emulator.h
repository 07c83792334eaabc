// Runs kernels written against device.cuh on a CPU, for tests: emulate(kernel, grid, block, bytes of
// shared memory, arguments...). Throws std::runtime_error, naming block and thread, for a deadlock,
// for lanes of a warp in different collectives, for shared memory out of range and for misaligned
// 16-byte accesses. Pointers are plain host memory. Needs no library and no flag but
// -DDENDRITE_EMULATE.
#pragma once

#include <dlfcn.h>

#include <tuple>
#include <utility>

#include "block.h"
#include "memory.h"
#include "numbers.h"
#include "warp.h"

#define DENDRITE_SHARED_MEMORY(T, name) \
  T* const name = reinterpret_cast<T*>(::dendrite::emulator::machine.shared_memory())

namespace dendrite {
namespace emulator {

// Forward or backward; tests of a kernel should run it under both.
inline void set_order(Order order) {
  const std::lock_guard<std::mutex> guard(machine.lock());
  machine.set_order(order);
}

// The (mangled) name where the dynamic linker knows it, else "kernel".
inline const char* kernel_name(const void* kernel) {
  Dl_info info;
  const bool found = dladdr(kernel, &info) != 0 && info.dli_sname != nullptr;
  return found && info.dli_saddr == kernel ? info.dli_sname : "kernel";
}

}  // namespace emulator

template <class... Parameters, class... Arguments>
void emulate(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
             Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "one argument for every parameter");
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  } call{kernel, {static_cast<Parameters>(arguments)...}};
  const auto body = [](void* opaque) {
    Call& each = *static_cast<Call*>(opaque);
    std::apply(each.kernel, each.parameters);
  };
  const std::lock_guard<std::mutex> guard(emulator::machine.lock());
  emulator::machine.run(grid, block, shared_bytes, body, &call,
                        emulator::kernel_name(reinterpret_cast<const void*>(kernel)));
}

}  // namespace dendrite
