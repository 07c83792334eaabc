// The names of device.cuh in CUDA: intrinsics and inline PTX (sm_80 and later).
#pragma once

#include "device_types.cuh"

// T name[], dynamic shared memory, aligned to 128 bytes. All kernels share one symbol.
extern __shared__ __align__(128) unsigned char dendrite_shared_memory[];
#define DENDRITE_SHARED_MEMORY(T, name) \
  T* const name = reinterpret_cast<T*>(::dendrite_shared_memory)

namespace dendrite {

// ---- numbers

DENDRITE_DEVICE float to_float(float value) { return value; }
DENDRITE_DEVICE float to_float(bf16 value) { return __uint_as_float(uint32_t(value.bits) << 16); }
DENDRITE_DEVICE float to_float(half_t value) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(value.bits));
  return out;
}

// Rounds to nearest, ties to even.
template <class T>
DENDRITE_DEVICE T from_float(float value);
template <>
DENDRITE_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
DENDRITE_DEVICE bf16 from_float<bf16>(float value) {
  bf16 out;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
  return out;
}
template <>
DENDRITE_DEVICE half_t from_float<half_t>(float value) {
  half_t out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
  return out;
}

// Two values in a register, `lo` in the lower half.
template <class T>
DENDRITE_DEVICE uint32_t pack2(float lo, float hi);
template <>
DENDRITE_DEVICE uint32_t pack2<bf16>(float lo, float hi) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(hi), "f"(lo));
  return out;
}
template <>
DENDRITE_DEVICE uint32_t pack2<half_t>(float lo, float hi) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(hi), "f"(lo));
  return out;
}

template <class T>
DENDRITE_DEVICE float2 unpack2(uint32_t packed);
template <>
DENDRITE_DEVICE float2 unpack2<bf16>(uint32_t packed) {
  return make_float2(__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u));
}
template <>
DENDRITE_DEVICE float2 unpack2<half_t>(uint32_t packed) {
  return make_float2(to_float(half_t{uint16_t(packed)}), to_float(half_t{uint16_t(packed >> 16)}));
}

// Two products of T.
template <class T>
DENDRITE_DEVICE uint32_t mul2(uint32_t a, uint32_t b);
template <>
DENDRITE_DEVICE uint32_t mul2<bf16>(uint32_t a, uint32_t b) {
  uint32_t out;  // sm_80 has no product alone
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(0x80008000u));
  return out;
}
template <>
DENDRITE_DEVICE uint32_t mul2<half_t>(uint32_t a, uint32_t b) {
  uint32_t out;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}

// Whether a pair of E4M3 becomes a pair of fp16 in one instruction.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
constexpr bool kConvertsE4m3 = true;
DENDRITE_DEVICE uint32_t e4m3_to_fp16(uint16_t pair) {
  uint32_t out;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(out) : "h"(pair));
  return out;
}
#else
constexpr bool kConvertsE4m3 = false;
DENDRITE_DEVICE uint32_t e4m3_to_fp16(uint16_t) { return 0; }
#endif

// Byte i of the result is byte `selector >> 4 i & 7` of the eight of a (the lower ones) and b.
DENDRITE_DEVICE uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

// A product that is rounded before it is added to anything.
DENDRITE_DEVICE float mul_rounded(float a, float b) { return __fmul_rn(a, b); }

// ---- warps and blocks

constexpr uint32_t kAllLanes = 0xffffffffu;

template <class T>
DENDRITE_DEVICE T shfl_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}
template <class T>
DENDRITE_DEVICE T shfl(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}
// Lanes without a source (the lowest, for up) keep their own value.
template <class T>
DENDRITE_DEVICE T shfl_up(T value, unsigned delta) {
  return __shfl_up_sync(kAllLanes, value, delta);
}
template <class T>
DENDRITE_DEVICE T shfl_down(T value, unsigned delta) {
  return __shfl_down_sync(kAllLanes, value, delta);
}
DENDRITE_DEVICE uint32_t ballot(bool pred) { return __ballot_sync(kAllLanes, pred); }
DENDRITE_DEVICE bool any_sync(bool pred) { return __any_sync(kAllLanes, pred) != 0; }
DENDRITE_DEVICE bool all_sync(bool pred) { return __all_sync(kAllLanes, pred) != 0; }
DENDRITE_DEVICE void sync_warp() { __syncwarp(); }
DENDRITE_DEVICE void sync_block() { __syncthreads(); }

// ---- tensor cores

DENDRITE_DEVICE uint32_t shared_address(const void* smem) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(smem));
}

DENDRITE_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(smem)));
}
DENDRITE_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(smem)));
}
DENDRITE_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(smem)));
}
DENDRITE_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(smem)));
}

// The transposed of an 8 x 8 matrix of 16-bit values: lane i has row i / 4, columns 2 (i % 4) and + 1.
DENDRITE_DEVICE uint32_t transpose_8x8(uint32_t row) {
  uint32_t out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(row));
  return out;
}

// d += a * b, [16, 8] += [16, 16] x [16, 8].
template <class T>
DENDRITE_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
DENDRITE_DEVICE void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
DENDRITE_DEVICE void mma_m16n8k16<half_t>(float (&d)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- copies (addresses are multiples of 16)

// Copies valid_bytes (0 to 16) and fills the rest with zeros; nothing is read when it is 0.
DENDRITE_DEVICE void cp_async_16(void* smem, const void* gmem, int valid_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(smem)),
               "l"(__cvta_generic_to_global(gmem)), "r"(valid_bytes)
               : "memory");
}
DENDRITE_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the N groups of this thread that were committed last are still under way.
template <int N>
DENDRITE_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Streaming load of memory that no kernel under way writes: read-only path, not kept in L1.
DENDRITE_DEVICE uint4 load_global_16(const void* gmem) {
  uint4 out;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
               : "l"(__cvta_generic_to_global(gmem)));
  return out;
}
DENDRITE_DEVICE uint4 load_16(const void* memory) { return *static_cast<const uint4*>(memory); }
DENDRITE_DEVICE void store_16(void* memory, uint4 value) { *static_cast<uint4*>(memory) = value; }

// ---- memory between blocks

// Returns the old value; relaxed: bracket it with thread_fence() to publish or to see other data.
DENDRITE_DEVICE int atomic_add(int* address, int value) { return atomicAdd(address, value); }
DENDRITE_DEVICE void thread_fence() { __threadfence(); }
DENDRITE_DEVICE int load_volatile(const int* address) {
  return *static_cast<const volatile int*>(address);
}
DENDRITE_DEVICE int load_acquire(const int* address) {
  int out;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
               : "=r"(out)
               : "l"(__cvta_generic_to_global(address))
               : "memory");
  return out;
}

// ---- fast math (subnormal operands and results count as zero)

DENDRITE_DEVICE float exp2_fast(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
DENDRITE_DEVICE float log2_fast(float x) {
  float out;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
DENDRITE_DEVICE float rsqrt_fast(float x) {
  float out;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// ---- programmatic dependent launch (nothing before sm_90)

// Returns when the kernels that this one follows have ended and their writes can be seen.
DENDRITE_DEVICE void grid_dependency_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// From here on the next kernel may start; it still waits, in its own call above, for our end. Kernels
// call this first and wait then, so that what the next ones do before their own wait (fetching
// weights, setting up) runs beside whatever is ahead. Some thread of every kernel has to wait: a
// kernel counts as ended when its blocks have, and its followers rely on what was ahead of it, too.
DENDRITE_DEVICE void grid_dependency_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace dendrite
