// Blocks of a cluster (sm_90 and later): barriers, and each other's shared memory. Not in the
// emulator.
#pragma once

#include "device.cuh"

namespace dendrite {

// A barrier of kThreads threads of the block; `barrier` from 1 to 15.
template <int kThreads>
DENDRITE_DEVICE void sync_threads(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

// All threads of all blocks; what they wrote to shared memory before can be read afterwards.
DENDRITE_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

// What lies at the place of `smem` in the shared memory of the cluster's block `rank`.
DENDRITE_DEVICE float4 load_cluster_16(const float* smem, int rank) {
  float4 out;
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %4, %5; "
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there]; }"
      : "=f"(out.x), "=f"(out.y), "=f"(out.z), "=f"(out.w)
      : "r"(shared_address(smem)), "r"(rank)
      : "memory");
  return out;
}

}  // namespace dendrite
