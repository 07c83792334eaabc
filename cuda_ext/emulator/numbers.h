// bf16 and fp16 by their bits, rounded to nearest even as the machine's conversions do.
#pragma once

#include "../include/dendrite/device_types.cuh"

namespace dendrite {

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) { return bits_float(uint32_t(value.bits) << 16); }
inline float to_float(half_t value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(value.bits & 0x7fffu) << 13;
  // As a float of exponent e - 112; the multiplication also sets subnormal numbers right.
  const uint32_t scaled = float_bits(bits_float(magnitude) * 0x1p112f);
  const bool finite = (value.bits & 0x7c00u) != 0x7c00u;
  return bits_float(sign | (finite ? scaled : 0x7f800000u | magnitude));
}

template <class T>
inline T from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline bf16 from_float<bf16>(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};  // the one NaN that conversions make
  return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
inline half_t from_float<half_t>(float value) {
  const uint32_t bits = float_bits(value), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // 65520 and above round to inf
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves multiples of 2^-24 in the mantissa
    const uint32_t sum = float_bits(bits_float(magnitude) + 0.5f);
    return {uint16_t(sign | (sum - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return {uint16_t(sign | ((rounded - 0x38000000u) >> 13))};
}

template <class T>
inline uint32_t pack2(float lo, float hi) {
  static_assert(sizeof(T) == 2);
  return uint32_t(from_float<T>(lo).bits) | uint32_t(from_float<T>(hi).bits) << 16;
}
template <class T>
inline float2 unpack2(uint32_t packed) {
  static_assert(sizeof(T) == 2);
  return {to_float(T{uint16_t(packed)}), to_float(T{uint16_t(packed >> 16)})};
}

template <class T>
inline uint32_t mul2(uint32_t a, uint32_t b) {
  const float2 x = unpack2<T>(a), y = unpack2<T>(b);
  return pack2<T>(x.x * y.x, x.y * y.y);
}

inline uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= uint32_t(bytes >> (selector >> (4 * i) & 7) * 8 & 0xff) << (8 * i);
  return out;
}

inline float mul_rounded(float a, float b) {
  volatile float product = a * b;  // not fused with what follows
  return product;
}

// Subnormal operands and results count as zero, as in the .ftz forms.
inline float flush(float value) {
  return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value;
}
inline float exp2_fast(float x) { return flush(std::exp2(flush(x))); }
inline float log2_fast(float x) { return std::log2(flush(x)); }
inline float rsqrt_fast(float x) { return 1.0f / std::sqrt(flush(x)); }

constexpr bool kConvertsE4m3 = false;
inline uint32_t e4m3_to_fp16(uint16_t) { return 0; }

}  // namespace dendrite
