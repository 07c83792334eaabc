// Runs kernels written against device.cuh on a CPU, for tests: emulate(kernel, grid, block, bytes
// of shared memory, arguments...). Pointers are plain host memory. Needs no library, and no flag
// but -DDENDRITE_EMULATE (add -Wno-unknown-pragmas for `#pragma unroll`).
//
// Throws std::runtime_error that names kernel, block and thread for: barriers that not all threads
// reach (deadlock), threads that meet in different calls, warp collectives with lanes missing,
// shared memory out of range in ldmatrix and cp_async or overwritten at its ends, misaligned
// 16-byte accesses, launches that a GPU would refuse. Shared memory is 0xff bytes (NaN) before
// every block. -fsanitize=address,undefined works too, and finds the rest of the stray accesses.
#pragma once

#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>
#include <string>
#include <tuple>
#include <utility>

#include "machine.h"
#include "memory.h"
#include "numbers.h"
#include "warp.h"

#define DENDRITE_SHARED_MEMORY(T, name) \
  T* const name = reinterpret_cast<T*>(::dendrite::emulator::machine.shared_memory())

namespace dendrite {
namespace emulator {

// Tests of a kernel should run it in every order; see Order.
inline void set_order(Order order, uint64_t seed = 0) { machine.set_order(order, seed); }

// The name where the dynamic linker knows it, and where it was launched from.
inline std::string kernel_name(const void* kernel, const Place& place) {
  std::string name = "kernel";
  Dl_info info;
  if (dladdr(kernel, &info) != 0 && info.dli_sname != nullptr && info.dli_saddr == kernel) {
    char* readable = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr);
    name = readable != nullptr ? readable : info.dli_sname;
    std::free(readable);
  }
  const std::string file = place.file;
  return name + " launched at " + file.substr(file.rfind('/') + 1) + ":" +
         std::to_string(place.line);
}

// The size of a grid, as a dim3 or its numbers, and where it was said.
struct Grid {
  dim3 size;
  Place place;

  Grid(dim3 size, Place place = Place::here()) : size(size), place(place) {}
  Grid(unsigned x, unsigned y = 1, unsigned z = 1, Place place = Place::here())
      : size(x, y, z), place(place) {}
};

}  // namespace emulator

template <class... Parameters, class... Arguments>
void emulate(void (*kernel)(Parameters...), emulator::Grid grid, dim3 block, size_t shared_bytes,
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
  emulator::machine.run(grid.size, block, shared_bytes, body, &call,
                        emulator::kernel_name(reinterpret_cast<const void*>(kernel), grid.place));
}

}  // namespace dendrite

// For a test that has loaded a library with kernels in it: order is that of emulator::Order.
extern "C" __attribute__((visibility("default"), used)) inline void dendrite_emulator_set_order(
    int order, uint64_t seed) {
  dendrite::emulator::set_order(dendrite::emulator::Order(order), seed);
}
