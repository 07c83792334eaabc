// Everything that kernels need from the machine: types, warp collectives, tensor cores, copies,
// atomics, fast math and programmatic launch. The only place with intrinsics. Compiled by nvcc
// (sm_80 and later), and by any C++20 compiler with -DDENDRITE_EMULATE, where the emulator runs
// the same kernels on a CPU.
//
// Rules that hold on both sides:
//   - warp collectives (shfl*, ballot, any_sync, all_sync, sync_warp, warp_*, ldmatrix*,
//     transpose_8x8, mma) need all 32 lanes of a warp, converged on the same call;
//   - a thread that returned no longer takes part in sync_block();
//   - what cp_async_16 copies is there, for the thread that asked, after the matching
//     cp_async_commit() and cp_async_wait<N>(), and for the others after a barrier behind that;
//   - shared memory is dynamic only: DENDRITE_SHARED_MEMORY(char, smem).
//
// Fragments of mma_m16n8k16 (g = lane / 4, t = 2 * (lane % 4); a register holds two values, that of
// the lower column or k in its lower half):
//   a[0]: row g, k t, t + 1              b[0]: k t, t + 1, column g
//   a[1]: row g + 8, k t, t + 1          b[1]: k t + 8, t + 9, column g
//   a[2]: row g, k t + 8, t + 9          d[0], d[1]: row g, columns t, t + 1
//   a[3]: row g + 8, k t + 8, t + 9      d[2], d[3]: row g + 8, columns t, t + 1
// ldmatrix: lane i gives the address of row i % 8 (8 values, 16 bytes) of matrix i / 8; r[m] of a
// lane is row g, columns t and t + 1 of matrix m; with _trans rows t and t + 1, column g. The _x2
// forms use the addresses of lanes 0 to 15.
#pragma once

#include "device_types.cuh"

#ifdef DENDRITE_EMULATE
#include "../../emulator/emulator.h"
#else
#include "device_cuda.cuh"
#endif

namespace dendrite {

// What a warp has in common; every lane gets the same bits (a butterfly, lanes 16 apart first).
template <class T>
DENDRITE_DEVICE T warp_sum(T value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += shfl_xor(value, mask);
  return value;
}

DENDRITE_DEVICE float larger(float a, float b) { return fmaxf(a, b); }  // drops a NaN
DENDRITE_DEVICE double larger(double a, double b) { return fmax(a, b); }
template <class T>
DENDRITE_DEVICE T larger(T a, T b) {
  return a > b ? a : b;
}

template <class T>
DENDRITE_DEVICE T warp_max(T value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value = larger(value, T(shfl_xor(value, mask)));
  return value;
}

}  // namespace dendrite
