// One vector into a packed page by a group of lanes: rotate, quantise, pack, scale. Bit for bit what
// cuda_ext/cpu/packed_store.h stores of the same vector: sums are halves added onto each other, and no
// product is fused with a sum.
//
// A lane holds elements 4 * lane .. + 3 of the first half and the same of the second, as RopePart
// does; `lanes`, a power of two, cover a half.
#pragma once

#include "packed_decode.cuh"

namespace dendrite {

constexpr int kLaneWords = 4;  // elements of each half that a lane holds

struct VectorPart {
  float first[kLaneWords], second[kLaneWords];

  template <class Function>
  DENDRITE_DEVICE void each(const Function& function) {
#pragma unroll
    for (int j = 0; j < kLaneWords; ++j) {
      first[j] = function(first[j]);
      second[j] = function(second[j]);
    }
  }
};

// What makes the transform orthonormal: 1 / sqrt(dim), of a power of two, rounded once.
DENDRITE_DEVICE float inverse_root(int dim) {
  float root = 1.0f;
  for (; dim >= 4; dim /= 4) root *= 0.5f;
  return dim == 2 ? root * 0.70710678118654752f : root;
}

DENDRITE_DEVICE void butterfly(float& a, float& b) {
  const float sum = a + b;
  b = a - b;
  a = sum;
}

// Unnormalised Walsh-Hadamard transform, distance 1 first; `lanes` * 8 elements, all lanes take part.
DENDRITE_DEVICE void hadamard(VectorPart& x, int lane, int lanes) {
#pragma unroll
  for (int distance = 1; distance < kLaneWords; distance *= 2)
#pragma unroll
    for (int j = 0; j < kLaneWords; ++j)
      if ((j & distance) == 0) {
        butterfly(x.first[j], x.first[j + distance]);
        butterfly(x.second[j], x.second[j + distance]);
      }
  for (int mask = 1; mask < lanes; mask *= 2) {
    const bool upper = (lane & mask) != 0;
    x.each([&](float mine) {
      const float other = shfl_xor(mine, mask);
      return upper ? other - mine : mine + other;
    });
  }
#pragma unroll
  for (int j = 0; j < kLaneWords; ++j) butterfly(x.first[j], x.second[j]);
}

// Sum over the vector of what the lanes hold; all lanes of the group get it.
DENDRITE_DEVICE float halving_sum(const float (&first)[kLaneWords], const float (&second)[kLaneWords],
                                  int lanes) {
  float part[kLaneWords];
#pragma unroll
  for (int j = 0; j < kLaneWords; ++j) part[j] = first[j] + second[j];
  for (int mask = lanes / 2; mask > 0; mask /= 2)
#pragma unroll
    for (int j = 0; j < kLaneWords; ++j) part[j] += shfl_xor(part[j], mask);
  return (part[0] + part[2]) + (part[1] + part[3]);
}

DENDRITE_DEVICE float largest_of(float a, const float (&x)[kLaneWords]) {
#pragma unroll
  for (int j = 0; j < kLaneWords; ++j) a = fmaxf(a, fabsf(x[j]));
  return a;
}

// Nearest E4M3, ties to even, saturating at 448. The number is finite.
DENDRITE_DEVICE uint32_t e4m3_of(float x) {
  const uint32_t word = float_bits(x), sign = word >> 24 & 0x80, size = word & 0x7fffffff;
  if (size >= 0x43e00000) return sign | 0x7e;
  if (size < 0x3c800000) {                                // below 2^-6: steps of 2^-9
    const float moved = bits_float(size) + 16384.0f;      // whose last place is 2^-9
    return sign | (float_bits(moved) - float_bits(16384.0f));
  }
  return sign | (size - (120u << 23) + 0x7ffff + (size >> 20 & 1)) >> 20;
}

// Nearest E5M2, ties to even, saturating at 57344.
DENDRITE_DEVICE uint32_t e5m2_of(float x) {
  const uint32_t word = float_bits(x), sign = word >> 24 & 0x80, size = word & 0x7fffffff;
  if (size >= 0x47600000) return sign | 0x7b;
  if (size < 0x38800000) {                             // below 2^-14: steps of 2^-16
    const float moved = bits_float(size) + 128.0f;     // whose last place is 2^-16
    return sign | (float_bits(moved) - float_bits(128.0f));
  }
  return sign | (size - (112u << 23) + 0xfffff + (size >> 21 & 1)) >> 21;
}

template <int kBits, int kPlace>
constexpr uint32_t kLimitBits = std::bit_cast<uint32_t>(kLimitAt<kBits, kPlace>);

// How many of the limits above 0 are at most the positive float that has these bits.
template <int kBits>
DENDRITE_DEVICE int limits_up_to(uint32_t x) {
  if constexpr (kBits == 2) {
    return x >= kLimitBits<2, 0>;
  } else if constexpr (kBits == 3) {
    const bool high = x >= kLimitBits<3, 1>;
    return 2 * high + (x >= (high ? kLimitBits<3, 2> : kLimitBits<3, 0>));
  } else {
    const bool high = x >= kLimitBits<4, 3>;
    const bool middle = x >= (high ? kLimitBits<4, 5> : kLimitBits<4, 1>);
    const uint32_t limit = middle ? (high ? kLimitBits<4, 6> : kLimitBits<4, 2>)
                                  : (high ? kLimitBits<4, 4> : kLimitBits<4, 0>);
    return 4 * high + 2 * middle + (x >= limit);
  }
}

// How many of all limits, which are symmetric and of which 0 is one, are at most y.
template <int kBits>
DENDRITE_DEVICE int code_of(float y) {
  constexpr int kHalf = 1 << (kBits - 1);
  const bool negative = y < 0.0f;  // then a limit has to be passed, and not only reached
  const int place = limits_up_to<kBits>(float_bits(fabsf(y)) - negative);
  return negative ? kHalf - 1 - place : kHalf + place;
}

template <int kBits>
DENDRITE_DEVICE float level_of(int code) {
  constexpr int kHalf = 1 << (kBits - 1);
  return code < kHalf ? -magnitude<kBits>(kHalf - 1 - code) : magnitude<kBits>(code - kHalf);
}

// Where a vector goes: its codes and its scales.
struct PackedPlace {
  char *row, *scales;
  int dim;
};

template <int kBits>
DENDRITE_DEVICE uint32_t packed_codes(const int (&codes)[kLaneWords]) {
  uint32_t word = 0;
#pragma unroll
  for (int j = 0; j < kLaneWords; ++j) word |= uint32_t(codes[j]) << (kBits * j);
  return word;
}

// Half a word of 4-bit codes, see packed_layer.h: that of the four codes of this lane, where its
// neighbour has the others.
DENDRITE_DEVICE uint16_t signed_codes(int group, const int (&codes)[kLaneWords]) {
  uint32_t half = 0, negative = 0;
#pragma unroll
  for (int j = 0; j < kLaneWords; ++j) {
    half |= uint32_t(codes[j] < 8 ? 7 - codes[j] : codes[j] - 8) << (4 * j);
    negative |= uint32_t(codes[j] < 8) << j;
  }
  const uint32_t other = shfl_xor(negative, 1);
  const uint32_t first = group % 2 == 0 ? negative : other >> 2;  // of the word's first four
  const uint32_t last = group % 2 == 0 ? other : negative >> 2;
  return uint16_t(half | (first & 1) << 7 | (first >> 1 & 1) << 15 | (last & 1) << 3 |
                  (last >> 1 & 1) << 11);
}

// Codes of elements 4 * group .. + 3. All lanes of the warp take part.
template <int kBits>
DENDRITE_DEVICE void store_codes(const PackedPlace& to, int group, const int (&codes)[kLaneWords],
                                 bool active) {
  if constexpr (kBits == 8) {
    if (active) *reinterpret_cast<uint32_t*>(to.row + 4 * group) = packed_codes<8>(codes);
  } else if constexpr (kBits == 4) {
    const uint16_t half = signed_codes(group, codes);
    if (active) *reinterpret_cast<uint16_t*>(to.row + 2 * group) = half;
  } else if constexpr (kBits == 2) {
    if (active) to.row[group] = char(packed_codes<2>(codes));
  } else {
    int low[kLaneWords], top[kLaneWords];
#pragma unroll
    for (int j = 0; j < kLaneWords; ++j) {
      low[j] = codes[j] & 3;
      top[j] = codes[j] >> 2;
    }
    const uint32_t mine = packed_codes<1>(top), other = shfl_xor(mine, 1);  // a byte is two lanes'
    if (!active) return;
    to.row[group] = char(packed_codes<2>(low));
    if (group % 2 == 0) to.row[to.dim / 4 + group / 2] = char(mine | other << 4);
  }
}

// A vector's group of lanes, and whether its result is wanted.
struct LaneGroup {
  int lane, lanes;
  bool active;
};

// From here on functions return whether what a vector reads as is infinite though the vector is not;
// all lanes of its group get the same.
constexpr uint16_t kInfiniteHalf = 0x7c00;

template <int kBits>
DENDRITE_DEVICE bool encode_rotated(VectorPart x, const VectorPart& signs, const PackedPlace& to,
                                    const LaneGroup& at, bool is_nan) {
  VectorPart part = x;
  part.each([](float v) { return mul_rounded(v, v); });
  const float norm = sqrtf(halving_sum(part.first, part.second, at.lanes));
  const float inverse = norm == 0.0f ? 0.0f : 1.0f / norm;
#pragma unroll
  for (int j = 0; j < kLaneWords; ++j) {
    x.first[j] = mul_rounded(x.first[j], signs.first[j]);
    x.second[j] = mul_rounded(x.second[j], signs.second[j]);
  }
  hadamard(x, at.lane, at.lanes);
  int first[kLaneWords], second[kLaneWords];
  VectorPart along, squares;
#pragma unroll
  for (int j = 0; j < kLaneWords; ++j) {
    const float a = mul_rounded(x.first[j], inverse), b = mul_rounded(x.second[j], inverse);
    first[j] = code_of<kBits>(a);
    second[j] = code_of<kBits>(b);
    const float p = level_of<kBits>(first[j]), q = level_of<kBits>(second[j]);
    along.first[j] = mul_rounded(a, p);
    along.second[j] = mul_rounded(b, q);
    squares.first[j] = mul_rounded(p, p);
    squares.second[j] = mul_rounded(q, q);
  }
  const float ratio = halving_sum(along.first, along.second, at.lanes) /
                      halving_sum(squares.first, squares.second, at.lanes);
  const float scale = mul_rounded(mul_rounded(norm, inverse_root(to.dim)), ratio);
  store_codes<kBits>(to, at.lane, first, at.active);
  store_codes<kBits>(to, at.lanes + at.lane, second, at.active);
  const uint16_t stored = from_float<half_t>(scale).bits;
  if (at.active && at.lane == 0) *reinterpret_cast<uint16_t*>(to.scales) = is_nan ? 0x7fff : stored;
  return stored >= kInfiniteHalf;
}

// Scale of E4M3: the largest number becomes at most 448.
DENDRITE_DEVICE uint16_t e4m3_scale(float largest) {
  uint16_t scale = from_float<half_t>(largest / 448.0f).bits;
  if (mul_rounded(to_float(half_t{scale}), 448.0f) < largest) ++scale;  // rounded down: one step up
  return scale;
}

DENDRITE_DEVICE float inverse_or_zero(float scale) { return scale == 0.0f ? 0.0f : 1.0f / scale; }

// Elements of half `half` (0 or 1) that start at 4 * lane, times `inverse`, as 8-bit floats.
template <bool kE5>
DENDRITE_DEVICE void store_float8(const PackedPlace& to, int group, const float (&x)[kLaneWords],
                                  float inverse, bool active) {
  int codes[kLaneWords];
#pragma unroll
  for (int j = 0; j < kLaneWords; ++j) {
    const float scaled = mul_rounded(x[j], inverse);
    codes[j] = int(kE5 ? e5m2_of(scaled) : e4m3_of(scaled));
  }
  store_codes<8>(to, group, codes, active);
}

DENDRITE_DEVICE float group_max(float value, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) value = fmaxf(value, shfl_xor(value, mask));
  return value;
}

DENDRITE_DEVICE bool encode_e4m3(const VectorPart& x, const PackedPlace& to, const LaneGroup& at,
                                 bool is_nan) {
  const float largest = group_max(largest_of(largest_of(0.0f, x.first), x.second), at.lanes);
  const uint16_t scale = e4m3_scale(largest);
  const float inverse = inverse_or_zero(to_float(half_t{scale}));
  const int groups = to.dim / 8;
  store_float8<false>(to, at.lane, x.first, inverse, at.active);
  store_float8<false>(to, groups + at.lane, x.second, inverse, at.active);
  if (at.active && at.lane == 0)
    *reinterpret_cast<uint16_t*>(to.scales) = is_nan ? 0x7fff : scale;
  return scale >= kInfiniteHalf;
}

// 8 lanes hold a block of 32. `half`: which half of the vector.
DENDRITE_DEVICE void encode_mxfp8(const float (&x)[kLaneWords], int half, const PackedPlace& to,
                                  const LaneGroup& at, bool is_nan) {
  const float largest = group_max(largest_of(0.0f, x), 8);
  uint32_t exponent = (float_bits(largest / 448.0f) + 0x7fffff) >> 23;  // of the next power of two
  exponent = exponent < 1 ? 1 : exponent > 255 ? 255 : exponent;
  const float inverse = exponent < 254 ? bits_float((254 - exponent) << 23) : 0.0f;
  store_float8<false>(to, half * (to.dim / 8) + at.lane, x, inverse, at.active);
  if (at.active && at.lane % 8 == 0)
    to.scales[half * (to.dim / 64) + at.lane / 8] = char(is_nan ? 255 : exponent);
}

template <class T>
DENDRITE_DEVICE bool encode_numbers(VectorPart x, const PackedPlace& to, const LaneGroup& at,
                                    bool is_nan) {
  const float largest = group_max(largest_of(largest_of(0.0f, x.first), x.second), at.lanes);
  if (at.active) {
    if (is_nan) x.first[0] = bits_float(0x7fc00000u);
    T* row = reinterpret_cast<T*>(to.row);
    store_floats<kLaneWords>(row + 4 * at.lane, x.first);
    store_floats<kLaneWords>(row + to.dim / 2 + 4 * at.lane, x.second);
  }
  return (float_bits(to_float(from_float<T>(largest))) & 0x7f800000u) == 0x7f800000u;
}

DENDRITE_DEVICE void encode_e5m2(const VectorPart& x, const PackedPlace& to, const LaneGroup& at,
                                 bool is_nan) {
  store_float8<true>(to, at.lane, x.first, 1.0f, at.active);
  store_float8<true>(to, to.dim / 8 + at.lane, x.second, 1.0f, at.active);
  if (at.active && is_nan && at.lane == 0) to.row[0] = 0x7f;
}

// Stores a vector. All lanes of the warp take part; where it is not wanted, with zeros. `is_nan`:
// what is stored shall read as NaN, whatever x is.
DENDRITE_DEVICE bool encode(int codec, const VectorPart& x, const VectorPart& signs,
                            const PackedPlace& to, const LaneGroup& at, bool is_nan) {
  switch (codec) {
    case kFp32: return encode_numbers<float>(x, to, at, is_nan);
    case kBf16: return encode_numbers<bf16>(x, to, at, is_nan);
    case kFp16: return encode_numbers<half_t>(x, to, at, is_nan);
    case kE4m3: return encode_e4m3(x, to, at, is_nan);
    case kE5m2: encode_e5m2(x, to, at, is_nan); return false;  // saturates
    case kMxfp8:
      encode_mxfp8(x.first, 0, to, at, is_nan);
      encode_mxfp8(x.second, 1, to, at, is_nan);
      return false;
    case kTq4: return encode_rotated<4>(x, signs, to, at, is_nan);
    case kTq3: return encode_rotated<3>(x, signs, to, at, is_nan);
    default: return encode_rotated<2>(x, signs, to, at, is_nan);
  }
}

}  // namespace dendrite
