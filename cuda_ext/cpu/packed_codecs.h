// From groups of 16 codes to vectors of levels, for one instruction set.
//
// Each codec has kBytes (of a group), kScale, a State that stays in registers during a tile, and
// decode(group, n, state): levels n * W .. n * W + W - 1 of the group.
#pragma once

#include "packed.h"
#include "simd.h"

namespace dendrite::DENDRITE_ISA {
namespace {

enum class Scale { none, token, block };

#if DENDRITE_LEVEL >= 3
// Of the intrinsics with a mask: GCC 12 warns about the undefined source operand of those without.
constexpr __mmask16 kAll = 0xffff;
#endif

template <class T>
DENDRITE_INLINE T read_as(const uint8_t* p) {
  T value;
  __builtin_memcpy(&value, p, sizeof(T));
  return value;
}

// W bytes, or W 16-bit numbers, as integers.
DENDRITE_INLINE vi widen_bytes(const uint8_t* p) {
#if DENDRITE_LEVEL >= 3
  return (vi)_mm512_maskz_cvtepu8_epi32(kAll, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif DENDRITE_LEVEL == 2
  return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  return vi{p[0], p[1], p[2], p[3]};
#endif
}
DENDRITE_INLINE vi widen_shorts(const uint8_t* p) {
#if DENDRITE_LEVEL >= 3
  return (vi)_mm512_maskz_cvtepu16_epi32(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif DENDRITE_LEVEL == 2
  return (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return vi{read_as<uint16_t>(p), read_as<uint16_t>(p + 2), read_as<uint16_t>(p + 4),
            read_as<uint16_t>(p + 6)};
#endif
}

// W fp16 numbers as floats; NaN and infinity stay what they are.
#if DENDRITE_LEVEL >= 3
DENDRITE_INLINE vf half_floats(__m256i h) { return (vf)_mm512_maskz_cvtph_ps(kAll, h); }
DENDRITE_INLINE vf load_halves(const uint8_t* p) {
  return half_floats(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
DENDRITE_INLINE vf load_upper_halves(const uint8_t* p) {  // W bytes, each the upper byte of an fp16
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return half_floats(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8));
}
#elif DENDRITE_LEVEL == 2
DENDRITE_INLINE vf load_halves(const uint8_t* p) {
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
DENDRITE_INLINE vf load_upper_halves(const uint8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (vf)_mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(bytes), 8));
}
#else
DENDRITE_INLINE vf half_floats(vi h) {
  const vi magnitude = (h & splat_int(0x7fff)) << 13;
  const vi special = magnitude >= splat_int(0x1f << 23);  // exponent 31
  const vf value = (vf)magnitude * splat<vf>(0x1p112f);
  const vi fixed = (bits(value) & ~special) | ((magnitude | splat_int(0x7f800000)) & special);
  return (vf)(fixed | ((h & splat_int(0x8000)) << 16));
}
DENDRITE_INLINE vf load_halves(const uint8_t* p) { return half_floats(widen_shorts(p)); }
DENDRITE_INLINE vf load_upper_halves(const uint8_t* p) { return half_floats(widen_bytes(p) << 8); }
#endif
DENDRITE_INLINE float half_float(uint16_t h) {
#if DENDRITE_LEVEL >= 2
  return _cvtsh_ss(h);
#else
  return half_floats(splat_int(h))[0];
#endif
}

// Powers of two with exponents e - 127; 255 stands for NaN.
DENDRITE_INLINE vf load_exponents(const uint8_t* p) {
  const vi e = widen_bytes(p);
  const vi nan = e == splat_int(255);
  return (vf)((e << 23) | (nan & splat_int(0x7fc00000)));
}

DENDRITE_INLINE float exponent_float(uint8_t e) {
  const int32_t word = e == 255 ? 0x7fc00000 : int32_t(e) << 23;
  float value;
  __builtin_memcpy(&value, &word, sizeof value);
  return value;
}

// Numbers E4M3 as floats. 0x7F reads as 480: its vector's scale is NaN.
DENDRITE_INLINE vf e4m3_floats(vi code) {
  const vi moved = ((code << 24) >> 4) & splat_int(int32_t(0x87f00000));
  return (vf)moved * splat<vf>(0x1p120f);
}

struct NoState {};

struct Fp32Codec {
  static constexpr int kBytes = 64;
  static constexpr Scale kScale = Scale::none;
  using State = NoState;
  DENDRITE_INLINE static vf decode(const uint8_t* g, int n, const State&) {
    return load<vf>(g + n * 4 * W);
  }
};
struct Bf16Codec {
  static constexpr int kBytes = 32;
  static constexpr Scale kScale = Scale::none;
  using State = NoState;
  DENDRITE_INLINE static vf decode(const uint8_t* g, int n, const State&) {
    return (vf)(widen_shorts(g + n * 2 * W) << 16);
  }
};
struct Fp16Codec {
  static constexpr int kBytes = 32;
  static constexpr Scale kScale = Scale::none;
  using State = NoState;
  DENDRITE_INLINE static vf decode(const uint8_t* g, int n, const State&) {
    return load_halves(g + n * 2 * W);
  }
};
struct E4m3Codec {
  static constexpr int kBytes = 16;
  static constexpr Scale kScale = Scale::token;
  using State = NoState;
  DENDRITE_INLINE static vf decode(const uint8_t* g, int n, const State&) {
    return e4m3_floats(widen_bytes(g + n * W));
  }
};
struct E5m2Codec {
  static constexpr int kBytes = 16;
  static constexpr Scale kScale = Scale::none;
  using State = NoState;
  DENDRITE_INLINE static vf decode(const uint8_t* g, int n, const State&) {
    return load_upper_halves(g + n * W);
  }
};
struct Mxfp8Codec : E4m3Codec {
  static constexpr Scale kScale = Scale::block;
};

// Levels of a codebook of up to 16, picked by the low bits of each lane.
template <int Bits>
constexpr float level_of(int code) {
  constexpr int half = 1 << (Bits - 1);
  const int place = code < half ? half - 1 - code : code - half;
  const float size = Bits == 4 ? kLevels4[place & 7] : Bits == 3 ? kLevels3[place & 3] : kLevels2[place & 1];
  return code < half ? -size : size;
}

#if DENDRITE_LEVEL >= 2
// Entry i of a table register is the level of code first + i % count.
template <int Bits>
DENDRITE_INLINE vf table(int first, int count) {
  float entries[W];
  for (int i = 0; i < W; ++i) entries[i] = level_of<Bits>(first + i % count);
  return load<vf>(entries);
}
DENDRITE_INLINE vi steps(int step, int begin) {
  int32_t lanes[W];
  for (int i = 0; i < W; ++i) lanes[i] = begin + step * i;
  return load<vi>(lanes);
}
#endif
#if DENDRITE_LEVEL >= 3
DENDRITE_INLINE vf pick(vf levels, vi code) {
  return (vf)_mm512_maskz_permutexvar_ps(kAll, (__m512i)code, (__m512)levels);
}
DENDRITE_INLINE vi shift_right(vi x, vi by) { return (vi)_mm512_maskz_srlv_epi32(kAll, (__m512i)x, (__m512i)by); }
#elif DENDRITE_LEVEL == 2
DENDRITE_INLINE vf pick(vf levels, vi code) {
  return (vf)_mm256_permutevar8x32_ps((__m256)levels, (__m256i)code);
}
DENDRITE_INLINE vi shift_right(vi x, vi by) { return (vi)_mm256_srlv_epi32((__m256i)x, (__m256i)by); }
// high where the sign bit of `chooser` is set.
DENDRITE_INLINE vf choose(vf low, vf high, vi chooser) {
  return (vf)_mm256_blendv_ps((__m256)low, (__m256)high, (__m256)chooser);
}
#endif

struct Tq4Codec {
  static constexpr int kBytes = 8;
  static constexpr Scale kScale = Scale::token;
#if DENDRITE_LEVEL >= 3
  struct State {
    vf levels = table<4>(0, 16);
    vi shifts = steps(4, 0) & splat_int(31);
    vi halves = steps(1, 0) >> 3;  // lanes 8 .. 15 read the second word
  };
  DENDRITE_INLINE static vf decode(const uint8_t* g, int, const State& s) {
    const __m512i words = _mm512_zextsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(g)));
    const vi spread = (vi)_mm512_maskz_permutexvar_epi32(kAll, (__m512i)s.halves, words);
    return pick(s.levels, shift_right(spread, s.shifts));
  }
#elif DENDRITE_LEVEL == 2
  struct State {
    vf low = table<4>(0, 8), high = table<4>(8, 8);
    vi shifts = steps(4, 0);
  };
  DENDRITE_INLINE static vf decode(const uint8_t* g, int n, const State& s) {
    const vi code = shift_right(splat_int(read_as<int32_t>(g + 4 * n)), s.shifts);
    return choose(pick(s.low, code), pick(s.high, code), code << 28);
  }
#else
  using State = NoState;
  DENDRITE_INLINE static vf decode(const uint8_t* g, int n, const State&) {
    const uint8_t a = g[2 * n], b = g[2 * n + 1];
    return vf{level_of<4>(a & 15), level_of<4>(a >> 4), level_of<4>(b & 15), level_of<4>(b >> 4)};
  }
#endif
};

struct Tq3Codec {
  static constexpr int kBytes = 6;
  static constexpr Scale kScale = Scale::token;
#if DENDRITE_LEVEL >= 2
  struct State {
    vf low = table<3>(0, 4), high = table<3>(4, 4);
    vi shifts = steps(2, 0), places = steps(1, 0);
  };
#endif
#if DENDRITE_LEVEL >= 3
  DENDRITE_INLINE static vf decode(const uint8_t* g, int, const State& s) {
    const vi code = shift_right(splat_int(read_as<int32_t>(g)), s.shifts);
    const __mmask16 third = read_as<uint16_t>(g + 4);
    return (vf)_mm512_mask_permutexvar_ps((__m512)pick(s.low, code), third, (__m512i)code,
                                          (__m512)s.high);
  }
#elif DENDRITE_LEVEL == 2
  DENDRITE_INLINE static vf decode(const uint8_t* g, int n, const State& s) {
    const vi code = shift_right(splat_int(int32_t(read_as<uint16_t>(g + 2 * n))), s.shifts);
    const vi third = shift_right(splat_int(g[4 + n]), s.places) << 31;
    return choose(pick(s.low, code), pick(s.high, code), third);
  }
#else
  using State = NoState;
  DENDRITE_INLINE static vf decode(const uint8_t* g, int n, const State&) {
    const int low = g[n], third = g[4 + n / 2] >> (4 * (n & 1));
    vf levels;
    for (int i = 0; i < W; ++i)
      levels[i] = level_of<3>(((low >> (2 * i)) & 3) | (((third >> i) & 1) << 2));
    return levels;
  }
#endif
};

struct Tq2Codec {
  static constexpr int kBytes = 4;
  static constexpr Scale kScale = Scale::token;
#if DENDRITE_LEVEL >= 2
  struct State {
    vf levels = table<2>(0, 4);
    vi shifts = steps(2, 0);
  };
  DENDRITE_INLINE static vf decode(const uint8_t* g, int n, const State& s) {
#if DENDRITE_LEVEL >= 3
    const int32_t codes = read_as<int32_t>(g);
    (void)n;
#else
    const int32_t codes = read_as<uint16_t>(g + 2 * n);
#endif
    return pick(s.levels, shift_right(splat_int(codes), s.shifts));
  }
#else
  using State = NoState;
  DENDRITE_INLINE static vf decode(const uint8_t* g, int n, const State&) {
    vf levels;
    for (int i = 0; i < W; ++i) levels[i] = level_of<2>((g[n] >> (2 * i)) & 3);
    return levels;
  }
#endif
};

// One scale of a strip, and W of them.
template <class C>
DENDRITE_INLINE float scale_at(const uint8_t* strip, int place) {
  if constexpr (C::kScale == Scale::token)
    return half_float(read_as<uint16_t>(strip + 2 * place));
  else if constexpr (C::kScale == Scale::block)
    return exponent_float(strip[place]);
  else
    return 1.0f;
}
template <class C>
DENDRITE_INLINE vf scales_at(const uint8_t* strip, int place) {
  return C::kScale == Scale::token ? load_halves(strip + 2 * place) : load_exponents(strip + place);
}

}  // namespace
}  // namespace dendrite::DENDRITE_ISA
