// Warpgroup products of Hopper with both operands in shared memory, k-major panels as in wgmma.cuh.
#pragma once

#include <type_traits>

#include "wgmma.cuh"

namespace dendrite {

#define DENDRITE_D4(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define DENDRITE_D16(n) DENDRITE_D4(n), DENDRITE_D4(n + 1), DENDRITE_D4(n + 2), DENDRITE_D4(n + 3)
// One instruction; the operands a, b and p are numbered behind the accumulators, which follow.
#define DENDRITE_WGMMA_OF(shape, type, registers, a_, b_, p_, ...)                                 \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " p_ ", 0; wgmma.mma_async.sync.aligned." shape     \
               ".f32." type "." type " {" registers "}, " a_ ", " b_ ", p, 1, 1, 0, 0; }"          \
               : __VA_ARGS__                                                                       \
               : "l"(a), "l"(b), "r"(int(add)))
// It, for the type of the operands.
#define DENDRITE_WGMMA(...)                                                             \
  do {                                                                                  \
    if constexpr (std::is_same_v<T, bf16>)                                              \
      DENDRITE_WGMMA_AS("bf16", __VA_ARGS__);                                           \
    else                                                                                \
      DENDRITE_WGMMA_AS("f16", __VA_ARGS__);                                            \
  } while (false)
#define DENDRITE_WGMMA_AS(type, shape, ...) DENDRITE_WGMMA_OF(shape, type, __VA_ARGS__)

// d [64 x 8 kN] (+)= a [64 x 16] * b [8 kN x 16]^T.
template <class T, int kN>
DENDRITE_DEVICE void wgmma_panels(float (&d)[kN][4], uint64_t a, uint64_t b, bool add) {
  static_assert(kN == 1 || kN == 2 || kN == 4 || kN == 8 || kN == 16, "no such instruction here");
  if constexpr (kN == 1)
    DENDRITE_WGMMA(
        "m64n8k16",
        "%0, %1, %2, %3",
        "%4", "%5", "%6", DENDRITE_D4(0));
  else if constexpr (kN == 2)
    DENDRITE_WGMMA(
        "m64n16k16",
        "%0, %1, %2, %3, %4, %5, %6, %7",
        "%8", "%9", "%10", DENDRITE_D4(0), DENDRITE_D4(1));
  else if constexpr (kN == 4)
    DENDRITE_WGMMA(
        "m64n32k16",
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15",
        "%16", "%17", "%18", DENDRITE_D16(0));
  else if constexpr (kN == 8)
    DENDRITE_WGMMA(
        "m64n64k16",
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
        "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31",
        "%32", "%33", "%34", DENDRITE_D16(0), DENDRITE_D16(4));
  else
    DENDRITE_WGMMA(
        "m64n128k16",
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
        "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "
        "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
        "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63",
        "%64", "%65", "%66", DENDRITE_D16(0), DENDRITE_D16(4), DENDRITE_D16(8), DENDRITE_D16(12));
}

#undef DENDRITE_WGMMA
#undef DENDRITE_WGMMA_AS
#undef DENDRITE_WGMMA_OF
#undef DENDRITE_D16
#undef DENDRITE_D4

}  // namespace dendrite
