// Warpgroup products of Hopper (sm_90a): 128 threads, operands in shared memory with a 128-byte
// swizzle, fp32 accumulators in registers. Not in the emulator: the other architectures' kernel
// does the same arithmetic there.
//
// A panel is [64 rows][64 values], 128 bytes a row; 16-byte part c of row r lies at part c ^ (r % 8).
// Panels start at multiples of 1024 bytes.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace dendrite {

constexpr int kPanelBytes = 64 * 128;

// Operands start at addresses as shared_address() tells them.
//
// Operand whose rows are contiguous along k (queries, keys): 8 rows are 1024 bytes.
DENDRITE_DEVICE uint64_t k_major(uint32_t smem) {
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  return kSwizzle128 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 16 |
         (smem & 0x3ffff) >> 4;
}

// Operand whose rows run along n (values: a row is a slot): the next 64 columns are a panel away.
template <int kPanelDistance = kPanelBytes>
DENDRITE_DEVICE uint64_t n_major(uint32_t smem) {
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  return kSwizzle128 | uint64_t(1024 >> 4) << 32 | uint64_t(kPanelDistance >> 4) << 16 |
         (smem & 0x3ffff) >> 4;
}

// The operand that many bytes behind one of the above (shared memory's addresses fit into 18 bits).
DENDRITE_DEVICE uint64_t advance(uint64_t operand, int bytes) {
  return operand >> 32 << 32 | (uint32_t(operand) + (bytes >> 4));
}

DENDRITE_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DENDRITE_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
DENDRITE_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accumulators across a fence or a wait.
template <int kN>
DENDRITE_DEVICE void hold(float (&d)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int c = 0; c < 4; ++c) asm volatile("" : "+f"(d[n][c])::"memory");
}

// Whether `pred` holds in some thread of a warpgroup; also a barrier of its 128 threads.
DENDRITE_DEVICE bool any_in_warpgroup(bool pred, int barrier) {
  int some;
  asm volatile(
      "{ .reg .pred p, q; setp.ne.b32 p, %1, 0; bar.red.or.pred q, %2, 128, p; selp.b32 %0, 1, 0, q; }"
      : "=r"(some)
      : "r"(int(pred)), "r"(barrier)
      : "memory");
  return some != 0;
}

#define DENDRITE_D4(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define DENDRITE_D16(n) DENDRITE_D4(n), DENDRITE_D4(n + 1), DENDRITE_D4(n + 2), DENDRITE_D4(n + 3)
#define DENDRITE_A "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
#define DENDRITE_32                                                                              \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "   \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DENDRITE_64                                                                              \
  DENDRITE_32                                                                                    \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DENDRITE_KEYS(n, type, registers, a, b, add)                                            \
  "{ .reg .pred p; setp.ne.b32 p, " add ", 0; wgmma.mma_async.sync.aligned.m64n" n "k16.f32." \
  type "." type " {" registers "}, {" a "}, " b ", p, 1, 1, 0; }"
#define DENDRITE_VALUES(n, type, registers, a, b)                                                  \
  "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" registers "}, {" a "}, " b \
  ", 1, 1, 1, 1;"

// d [64 x 8 kN] (+)= a [64 x 16] * b [8 kN x 16]^T: a from registers (as mma_m16n8k16 takes it, a
// warp holds 16 rows), b k-major from shared memory.
template <class T, int kN>
DENDRITE_DEVICE void wgmma_keys(float (&d)[kN][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  static_assert(kN == 8 || kN == 16, "no such instruction here");
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  if constexpr (kN == 8 && kBf16)
    asm volatile(DENDRITE_KEYS("64", "bf16", DENDRITE_32, "%32, %33, %34, %35", "%36", "%37")
                 : DENDRITE_D16(0), DENDRITE_D16(4) : DENDRITE_A, "l"(b), "r"(int(add)));
  else if constexpr (kN == 8)
    asm volatile(DENDRITE_KEYS("64", "f16", DENDRITE_32, "%32, %33, %34, %35", "%36", "%37")
                 : DENDRITE_D16(0), DENDRITE_D16(4) : DENDRITE_A, "l"(b), "r"(int(add)));
  else if constexpr (kBf16)
    asm volatile(DENDRITE_KEYS("128", "bf16", DENDRITE_64, "%64, %65, %66, %67", "%68", "%69")
                 : DENDRITE_D16(0), DENDRITE_D16(4), DENDRITE_D16(8), DENDRITE_D16(12)
                 : DENDRITE_A, "l"(b), "r"(int(add)));
  else
    asm volatile(DENDRITE_KEYS("128", "f16", DENDRITE_64, "%64, %65, %66, %67", "%68", "%69")
                 : DENDRITE_D16(0), DENDRITE_D16(4), DENDRITE_D16(8), DENDRITE_D16(12)
                 : DENDRITE_A, "l"(b), "r"(int(add)));
}

// d [64 x 8 kN] += a [64 x 16] * b [16 x 8 kN]: a from registers, b n-major from shared memory.
template <class T, int kN>
DENDRITE_DEVICE void wgmma_values(float (&d)[kN][4], const uint32_t (&a)[4], uint64_t b) {
  static_assert(kN == 8 || kN == 16, "no such instruction here");
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  if constexpr (kN == 8 && kBf16)
    asm volatile(DENDRITE_VALUES("64", "bf16", DENDRITE_32, "%32, %33, %34, %35", "%36")
                 : DENDRITE_D16(0), DENDRITE_D16(4) : DENDRITE_A, "l"(b));
  else if constexpr (kN == 8)
    asm volatile(DENDRITE_VALUES("64", "f16", DENDRITE_32, "%32, %33, %34, %35", "%36")
                 : DENDRITE_D16(0), DENDRITE_D16(4) : DENDRITE_A, "l"(b));
  else if constexpr (kBf16)
    asm volatile(DENDRITE_VALUES("128", "bf16", DENDRITE_64, "%64, %65, %66, %67", "%68")
                 : DENDRITE_D16(0), DENDRITE_D16(4), DENDRITE_D16(8), DENDRITE_D16(12)
                 : DENDRITE_A, "l"(b));
  else
    asm volatile(DENDRITE_VALUES("128", "f16", DENDRITE_64, "%64, %65, %66, %67", "%68")
                 : DENDRITE_D16(0), DENDRITE_D16(4), DENDRITE_D16(8), DENDRITE_D16(12)
                 : DENDRITE_A, "l"(b));
}

#undef DENDRITE_VALUES
#undef DENDRITE_KEYS
#undef DENDRITE_64
#undef DENDRITE_32
#undef DENDRITE_A
#undef DENDRITE_D16
#undef DENDRITE_D4

}  // namespace dendrite
