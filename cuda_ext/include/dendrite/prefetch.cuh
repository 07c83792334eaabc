// Hints about memory that will be read: they move bytes and change no result.
#pragma once

#include "device.cuh"

namespace dendrite {

// Asks for `bytes` (a multiple of 16) at gmem (too) to be brought into L2. The memory has to be
// there: nothing is promised for addresses outside an allocation.
DENDRITE_DEVICE void prefetch_l2([[maybe_unused]] const void* gmem, [[maybe_unused]] int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(gmem)),
               "r"(bytes)
               : "memory");
#elif defined(__CUDA_ARCH__)
  for (int at = 0; at < bytes; at += 128)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(
        __cvta_generic_to_global(static_cast<const char*>(gmem) + at)));
#endif
}

// cp_async_16 of memory whose neighbours in the line of 128 bytes are wanted soon after.
DENDRITE_DEVICE void cp_async_16_line(void* smem, const void* gmem, int valid_bytes) {
#ifdef DENDRITE_EMULATE
  cp_async_16(smem, gmem, valid_bytes);
#else
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                   shared_address(smem)),
               "l"(__cvta_generic_to_global(gmem)), "r"(valid_bytes)
               : "memory");
#endif
}

}  // namespace dendrite
