// Vector types for one instruction set (GCC/clang vector extensions). Included only by isa_*.cc, each
// of which defines DENDRITE_ISA (a namespace name) and DENDRITE_LEVEL (0 scalar, 1 NEON, 2 AVX2,
// 3 AVX-512). Everything sits in an anonymous namespace: one object file's code never replaces another's.
#pragma once

#include <cstdint>

#if DENDRITE_LEVEL >= 2
#include <immintrin.h>
#elif DENDRITE_LEVEL == 1
#include <arm_neon.h>
#endif

#define DENDRITE_INLINE inline __attribute__((always_inline))

namespace dendrite::DENDRITE_ISA {
namespace {

typedef float f4 __attribute__((vector_size(16)));
typedef int32_t i4 __attribute__((vector_size(16)));

DENDRITE_INLINE f4 splat_to(f4, float x) { return f4{x, x, x, x}; }
DENDRITE_INLINE i4 splat_to(i4, int32_t x) { return i4{x, x, x, x}; }
DENDRITE_INLINE f4 fma(f4 a, f4 b, f4 c) {
#if DENDRITE_LEVEL == 1
  return vfmaq_f32(c, a, b);
#elif DENDRITE_LEVEL >= 2
  return _mm_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

#if DENDRITE_LEVEL >= 2
typedef float f8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));
DENDRITE_INLINE f8 splat_to(f8, float x) { return _mm256_set1_ps(x); }
DENDRITE_INLINE i8 splat_to(i8, int32_t x) { return (i8)_mm256_set1_epi32(x); }
DENDRITE_INLINE f8 fma(f8 a, f8 b, f8 c) { return _mm256_fmadd_ps(a, b, c); }
#endif

#if DENDRITE_LEVEL >= 3
typedef float f16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
DENDRITE_INLINE f16 splat_to(f16, float x) { return _mm512_set1_ps(x); }
DENDRITE_INLINE i16 splat_to(i16, int32_t x) { return (i16)_mm512_set1_epi32(x); }
DENDRITE_INLINE f16 fma(f16 a, f16 b, f16 c) { return _mm512_fmadd_ps(a, b, c); }
#endif

#if DENDRITE_LEVEL >= 3
typedef f16 vf;
typedef i16 vi;
#elif DENDRITE_LEVEL == 2
typedef f8 vf;
typedef i8 vi;
#else
typedef f4 vf;
typedef i4 vi;
#endif
constexpr int W = sizeof(vf) / sizeof(float);

template <class V>
DENDRITE_INLINE V splat(float x) {
  return splat_to(V{}, x);
}
template <class V>
DENDRITE_INLINE V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
DENDRITE_INLINE void store(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}
DENDRITE_INLINE vi bits(vf x) { return (vi)x; }
DENDRITE_INLINE vi splat_int(int32_t x) { return splat_to(vi{}, x); }

DENDRITE_INLINE int least(int a, int b) { return a < b ? a : b; }
DENDRITE_INLINE int most(int a, int b) { return a > b ? a : b; }

// Sum and maximum of the lanes: halves are folded onto each other, always in the same order.
DENDRITE_INLINE float sum_lanes(f4 v) { return (v[0] + v[2]) + (v[1] + v[3]); }
DENDRITE_INLINE float max_lanes(f4 v) {
  const float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
  return a > b ? a : b;
}
#if DENDRITE_LEVEL >= 2
DENDRITE_INLINE f4 low_half(f8 v) { return _mm256_castps256_ps128(v); }
DENDRITE_INLINE f4 high_half(f8 v) { return _mm256_extractf128_ps(v, 1); }
DENDRITE_INLINE float sum_lanes(f8 v) { return sum_lanes(low_half(v) + high_half(v)); }
DENDRITE_INLINE float max_lanes(f8 v) {
  const f4 a = low_half(v), b = high_half(v);
  return max_lanes(a > b ? a : b);
}
#endif
#if DENDRITE_LEVEL >= 3
// Not the intrinsics: GCC 12 warns about their undefined source operand.
DENDRITE_INLINE f8 low_half(f16 v) {
  f8 half;
  __builtin_memcpy(&half, &v, sizeof half);
  return half;
}
DENDRITE_INLINE f8 high_half(f16 v) {
  f8 half;
  __builtin_memcpy(&half, reinterpret_cast<const char*>(&v) + sizeof half, sizeof half);
  return half;
}
DENDRITE_INLINE float sum_lanes(f16 v) { return sum_lanes(low_half(v) + high_half(v)); }
DENDRITE_INLINE float max_lanes(f16 v) {
  const f8 a = low_half(v), b = high_half(v);
  return max_lanes(a > b ? a : b);
}
#endif
DENDRITE_INLINE bool any_set(vi mask) {
#if DENDRITE_LEVEL >= 3
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif DENDRITE_LEVEL == 2
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#else
  return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}

// e^x with relative error below 2e-7; the same bits for a value in any lane. Below -87.33 (the
// smallest normal result, and -inf) the result is 0; above 88.37 it stays at e^88.37; NaN stays NaN.
DENDRITE_INLINE vf exp_lanes(vf x) {
  const vf top = splat<vf>(88.3762626647950f), bottom = splat<vf>(-87.3365447504019f);
  const vf magic = splat<vf>(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const vi underflow = x < bottom;
  x = x > top ? top : x;
  x = x < bottom ? bottom : x;
  const vf shifted = fma(x, splat<vf>(1.44269504088896341f), magic);
  const vf n = shifted - magic;
  vf r = fma(n, splat<vf>(-0.693359375f), x);
  r = fma(n, splat<vf>(2.12194440e-4f), r);
  vf p = splat<vf>(1.9875691500e-4f);
  p = fma(p, r, splat<vf>(1.3981999507e-3f));
  p = fma(p, r, splat<vf>(8.3334519073e-3f));
  p = fma(p, r, splat<vf>(4.1665795894e-2f));
  p = fma(p, r, splat<vf>(1.6666665459e-1f));
  p = fma(p, r, splat<vf>(5.0000001201e-1f));
  p = fma(p * r, r, r) + splat<vf>(1.0f);
  const vi exponent = (bits(shifted) - bits(magic) + splat_int(127)) << 23;
  const vf result = p * (vf)exponent;
  return (vf)(~underflow & bits(result));
}
DENDRITE_INLINE float exp_one(float x) { return exp_lanes(splat<vf>(x))[0]; }

}  // namespace
}  // namespace dendrite::DENDRITE_ISA
