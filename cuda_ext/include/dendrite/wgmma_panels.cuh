// Warpgroup products of Hopper with both operands in shared memory, k-major panels as in wgmma.cuh.
#pragma once

#include <type_traits>

#include "wgmma.cuh"

namespace dendrite {

#define DENDRITE_D4(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define DENDRITE_D16(n) DENDRITE_D4(n), DENDRITE_D4(n + 1), DENDRITE_D4(n + 2), DENDRITE_D4(n + 3)
// `a`, `b` and `p` number the operands behind the accumulators.
#define DENDRITE_WGMMA(shape, type, registers, a, b, p)                                       \
  "{ .reg .pred p; setp.ne.b32 p, " p ", 0; wgmma.mma_async.sync.aligned." shape ".f32." type \
  "." type " {" registers "}, " a ", " b ", p, 1, 1, 0, 0; }"

// d [64 x 8 kN] (+)= a [64 x 16] * b [8 kN x 16]^T.
template <class T, int kN>
DENDRITE_DEVICE void wgmma_panels(float (&d)[kN][4], uint64_t a, uint64_t b, bool add) {
  static_assert(kN == 1 || kN == 2 || kN == 4 || kN == 8 || kN == 16, "no such instruction here");
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  if constexpr (kN == 1) {
#define DENDRITE_REGISTERS \
  "%0, %1, %2, %3"
    if constexpr (kBf16)
      asm volatile(DENDRITE_WGMMA("m64n8k16", "bf16", DENDRITE_REGISTERS, "%4", "%5", "%6")
                   : DENDRITE_D4(0) : "l"(a), "l"(b), "r"(int(add)));
    else
      asm volatile(DENDRITE_WGMMA("m64n8k16", "f16", DENDRITE_REGISTERS, "%4", "%5", "%6")
                   : DENDRITE_D4(0) : "l"(a), "l"(b), "r"(int(add)));
#undef DENDRITE_REGISTERS
  } else if constexpr (kN == 2) {
#define DENDRITE_REGISTERS \
  "%0, %1, %2, %3, %4, %5, %6, %7"
    if constexpr (kBf16)
      asm volatile(DENDRITE_WGMMA("m64n16k16", "bf16", DENDRITE_REGISTERS, "%8", "%9", "%10")
                   : DENDRITE_D4(0), DENDRITE_D4(1) : "l"(a), "l"(b), "r"(int(add)));
    else
      asm volatile(DENDRITE_WGMMA("m64n16k16", "f16", DENDRITE_REGISTERS, "%8", "%9", "%10")
                   : DENDRITE_D4(0), DENDRITE_D4(1) : "l"(a), "l"(b), "r"(int(add)));
#undef DENDRITE_REGISTERS
  } else if constexpr (kN == 4) {
#define DENDRITE_REGISTERS \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
    if constexpr (kBf16)
      asm volatile(DENDRITE_WGMMA("m64n32k16", "bf16", DENDRITE_REGISTERS, "%16", "%17", "%18")
                   : DENDRITE_D16(0) : "l"(a), "l"(b), "r"(int(add)));
    else
      asm volatile(DENDRITE_WGMMA("m64n32k16", "f16", DENDRITE_REGISTERS, "%16", "%17", "%18")
                   : DENDRITE_D16(0) : "l"(a), "l"(b), "r"(int(add)));
#undef DENDRITE_REGISTERS
  } else if constexpr (kN == 8) {
#define DENDRITE_REGISTERS \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, " \
  "%30, %31"
    if constexpr (kBf16)
      asm volatile(DENDRITE_WGMMA("m64n64k16", "bf16", DENDRITE_REGISTERS, "%32", "%33", "%34")
                   : DENDRITE_D16(0), DENDRITE_D16(4) : "l"(a), "l"(b), "r"(int(add)));
    else
      asm volatile(DENDRITE_WGMMA("m64n64k16", "f16", DENDRITE_REGISTERS, "%32", "%33", "%34")
                   : DENDRITE_D16(0), DENDRITE_D16(4) : "l"(a), "l"(b), "r"(int(add)));
#undef DENDRITE_REGISTERS
  } else {
#define DENDRITE_REGISTERS \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, " \
  "%30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, " \
  "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, " \
  "%58, %59, %60, %61, %62, %63"
    if constexpr (kBf16)
      asm volatile(DENDRITE_WGMMA("m64n128k16", "bf16", DENDRITE_REGISTERS, "%64", "%65", "%66")
                   : DENDRITE_D16(0), DENDRITE_D16(4), DENDRITE_D16(8), DENDRITE_D16(12) : "l"(a), "l"(b), "r"(int(add)));
    else
      asm volatile(DENDRITE_WGMMA("m64n128k16", "f16", DENDRITE_REGISTERS, "%64", "%65", "%66")
                   : DENDRITE_D16(0), DENDRITE_D16(4), DENDRITE_D16(8), DENDRITE_D16(12) : "l"(a), "l"(b), "r"(int(add)));
#undef DENDRITE_REGISTERS
  }
}

#undef DENDRITE_WGMMA
#undef DENDRITE_D16
#undef DENDRITE_D4

}  // namespace dendrite
