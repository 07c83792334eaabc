// Bulk copies of Hopper (sm_90a): boxes of a tensor are brought to shared memory by one thread and
// complete on a barrier in shared memory. Not in the emulator.
#pragma once

#include <cuda.h>

#include "device.cuh"

namespace dendrite {

// A byte of shared memory, as shared_address() tells it.
using SharedAddress = uint32_t;

// A barrier in shared memory takes 8 bytes. Its phases are told apart by their parity; the first has
// parity 0.
constexpr int kMbarrierBytes = 8;

DENDRITE_DEVICE void mbarrier_init(SharedAddress barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals)
               : "memory");
}
// After the last init and before the block's barrier.
DENDRITE_DEVICE void mbarrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
DENDRITE_DEVICE void mbarrier_arrive(SharedAddress barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier)
               : "memory");
}
// Arrives; the phase ends when so many bytes have been copied too.
DENDRITE_DEVICE void mbarrier_arrive_and_expect(SharedAddress barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
               "r"(bytes)
               : "memory");
}
// Returns when the phase of this parity has ended; that of parity 1 before phase 0 counts as ended.
DENDRITE_DEVICE void mbarrier_wait(SharedAddress barrier, int parity) {
  asm volatile(
      "{ .reg .pred done; again: "
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra again; }" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// The address as a number that the compiler keeps, instead of making it again wherever it is used.
DENDRITE_DEVICE SharedAddress kept(SharedAddress address) {
  asm volatile("" : "+r"(address));
  return address;
}
DENDRITE_DEVICE uint4 load_shared_16(SharedAddress from) {
  uint4 out;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
               : "r"(from)
               : "memory");
  return out;
}
DENDRITE_DEVICE void store_shared_16(SharedAddress to, uint4 value) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
}

DENDRITE_DEVICE float2 load_shared_floats(SharedAddress from) {
  float2 out;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(out.x), "=f"(out.y) : "r"(from) : "memory");
  return out;
}
DENDRITE_DEVICE void store_shared_float(SharedAddress to, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(value) : "memory");
}

// What this thread wrote to shared memory can be seen by warpgroup products and bulk copies.
DENDRITE_DEVICE void publish_to_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// `bytes` (a multiple of 16) from global memory, by one thread.
DENDRITE_DEVICE void load_bytes(SharedAddress smem, const void* from, int bytes,
                                SharedAddress barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          smem),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
      : "memory");
}

// A barrier of `threads` threads of the block.
DENDRITE_DEVICE void sync_some(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

DENDRITE_DEVICE void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// The box of `map` (in constant kernel parameters) that starts at (x, y, z).
DENDRITE_DEVICE void load_box(SharedAddress smem, const CUtensorMap* map, SharedAddress barrier,
                              int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(smem),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// Registers of a thread from here on; all warps of a warpgroup call it.
template <int kRegisters>
DENDRITE_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
DENDRITE_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace dendrite
