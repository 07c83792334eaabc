// From codes of packed pages to numbers: 8 at a time, as 16-bit operands of tensor cores (levels
// rounded to their type) or as floats. Scales of a whole vector are left to the caller, which
// multiplies scores and weights with them in fp32; those of blocks (mxfp8) are applied here.
#pragma once

#include <bit>

#include "packed_layer.h"
#include "vectors.cuh"

namespace dendrite {

// Bits of a normal number in T.
template <class T>
constexpr uint16_t bits_of_level(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if constexpr (std::is_same_v<T, bf16>)
    return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  else
    return uint16_t((bits - (112u << 23) + 0xfffu + (bits >> 13 & 1u)) >> 13);
}

// Bytes 0 (low) or 1 of the levels first .. first + 3 of a codebook, in a word.
template <class T, int kCount>
constexpr uint32_t bytes_of_levels(const float (&levels)[kCount], int first, int byte) {
  uint32_t word = 0;
  for (int i = 0; i < 4 && first + i < kCount; ++i)
    word |= uint32_t(bits_of_level<T>(levels[first + i]) >> (8 * byte) & 0xff) << (8 * i);
  return word;
}

template <class T, int kBits>
struct LevelBytes {
  static constexpr uint32_t of(int first, int byte) {
    if constexpr (kBits == 4) return bytes_of_levels<T>(kLevels4, first, byte);
    if constexpr (kBits == 3) return bytes_of_levels<T>(kLevels3, first, byte);
    if constexpr (kBits == 2) return bytes_of_levels<T>(kLevels2, first, byte);
  }
  static constexpr uint32_t kLow0 = of(0, 0), kLow1 = of(4, 0);
  static constexpr uint32_t kHigh0 = of(0, 1), kHigh1 = of(4, 1);
};

// 8 codes of a rotated vector: the places of their magnitudes, a nibble each, and the signs of the
// first and of the last four, in the highest bit of a byte each. Other bits of `signs` are anything.
struct SignedPlaces {
  uint32_t place, signs[2];

  DENDRITE_DEVICE bool is_negative(int i) const {
    return (signs[i / 4] >> (8 * (i % 4) + 7) & 1) != 0;
  }
};

// From a nibble each, 1 for a negative one.
DENDRITE_DEVICE SignedPlaces places_of(uint32_t place, uint32_t negative) {
  return {place, {byte_perm(0x8000u, 0, negative), byte_perm(0x8000u, 0, negative >> 16)}};
}

// 2-bit fields to nibbles, and single bits.
DENDRITE_DEVICE uint32_t spread_pairs(uint32_t x) {
  x = (x | x << 8) & 0x00ff00ffu;
  x = (x | x << 4) & 0x0f0f0f0fu;
  return (x | x << 2) & 0x33333333u;
}
DENDRITE_DEVICE uint32_t spread_bits(uint32_t x) {
  x = (x | x << 12) & 0x000f000fu;
  x = (x | x << 6) & 0x03030303u;
  return (x | x << 3) & 0x11111111u;
}

// `codes`: 8 codes of 4 bits, as packed_layer.h has them, or the 2-bit fields of 8 codes; `top`: the
// third bits of 3-bit ones.
template <int kBits>
DENDRITE_DEVICE SignedPlaces signed_places(uint32_t codes, uint32_t top) {
  if constexpr (kBits == 4) {
    return {codes & 0x77777777u, {codes, codes << 4}};
  } else {
    const uint32_t pairs = spread_pairs(codes);
    if constexpr (kBits == 3) {
      const uint32_t negative = spread_bits(top) ^ 0x11111111u;
      return places_of(pairs ^ 3 * negative, negative);
    }
    const uint32_t negative = ~(pairs >> 1) & 0x11111111u;
    return places_of((pairs ^ negative) & 0x11111111u, negative);
  }
}

// Numbers of E4M3 as fp16 are over 2^8, and their scales times as much: weights are multiplied with
// scales of values, which alone, 1/448 of the largest value, could leave the range of fp16.
constexpr int kHalfShift = 8;

// Two numbers of T from two bytes E4M3 or E5M2 in the upper halves of 16 bits each, those of E4M3 as
// fp16 over 2^kHalfShift. 0x7F of E4M3 reads as 480: its vector's scale is NaN. E5M2 is the upper byte
// of fp16, NaN included.
template <class T, bool kE5>
DENDRITE_DEVICE uint32_t float8_pair(uint32_t x) {
  constexpr bool kToBf16 = std::is_same_v<T, bf16>;
  if constexpr (kE5) {
    if constexpr (!kToBf16) return x;
    const float2 two = unpack2<half_t>(x);
    return pack2<T>(two.x, two.y);
  } else if constexpr (kToBf16) {
    return mul2<T>((x >> 4 & 0x07f007f0u) | (x & 0x80008000u), 0x7b807b80u);
  } else {
    return (x >> 1 & 0x3f803f80u) | (x & 0x80008000u);
  }
}

// A pair of E4M3, times 2^(exponent - 127); 255 stands for NaN.
template <class T>
DENDRITE_DEVICE uint32_t times_power(uint32_t pair, uint32_t exponent) {
  if constexpr (std::is_same_v<T, bf16>) {
    const uint32_t factor = exponent == 255 ? 0x7fc0u : exponent << 7;
    return mul2<bf16>(pair, factor | factor << 16);
  } else {
    const float factor = bits_float(exponent == 255 ? 0x7fc00000u : (exponent + kHalfShift) << 23);
    const float2 two = unpack2<T>(pair);
    return pack2<T>(two.x * factor, two.y * factor);
  }
}

template <class T, int kBits>
DENDRITE_DEVICE Packed<T, 8> levels_of(const SignedPlaces& at) {
  using Bytes = LevelBytes<T, kBits>;
  Packed<T, 8> out;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t place = at.place >> (16 * i);
    const uint32_t low = byte_perm(Bytes::kLow0, Bytes::kLow1, place);
    const uint32_t high =
        byte_perm(Bytes::kHigh0, Bytes::kHigh1, place) | (at.signs[i] & 0x80808080u);
    out.words[2 * i] = byte_perm(low, high, 0x5140);
    out.words[2 * i + 1] = byte_perm(low, high, 0x7362);
  }
  return out;
}

// kBytes from an address that is a multiple of them, or of 16.
template <int kBytes>
DENDRITE_DEVICE void load_words(uint32_t (&words)[(kBytes + 3) / 4], const char* from) {
  if constexpr (kBytes == 1) {
    words[0] = *reinterpret_cast<const uint8_t*>(from);
  } else if constexpr (kBytes == 2) {
    words[0] = *reinterpret_cast<const uint16_t*>(from);
  } else if constexpr (kBytes == 4) {
    words[0] = *reinterpret_cast<const uint32_t*>(from);
  } else {
    const auto loaded = load_packed<uint32_t, kBytes / 4>(reinterpret_cast<const uint32_t*>(from));
#pragma unroll
    for (int i = 0; i < kBytes / 4; ++i) words[i] = loaded.words[i];
  }
}

// The codes of kChunks times 8 consecutive values, as they lie in memory.
template <int kCodec, int kChunks>
struct CodePiece {
  static constexpr int kBits = kCodecBits[kCodec];
  static constexpr int kBytes = kChunks * (kBits == 3 ? 2 : kBits);  // without third bits
  uint32_t words[(kBytes + 3) / 4], tops[(kChunks + 3) / 4];

  // Piece `index` of a vector of `dim` values, whose codes begin at `row`.
  DENDRITE_DEVICE CodePiece(const char* row, int index, int dim) {
    load_words<kBytes>(words, row + index * kBytes);
    if constexpr (kBits == 3) load_words<kChunks>(tops, row + dim / 4 + index * kChunks);
  }

  DENDRITE_DEVICE SignedPlaces places(int chunk) const {
    if constexpr (kBits == 4) return signed_places<4>(words[chunk], 0);
    const uint32_t pairs = words[chunk / 2] >> (16 * (chunk % 2)) & 0xffffu;
    if constexpr (kBits == 2) return signed_places<2>(pairs, 0);
    return signed_places<3>(pairs, tops[chunk / 4] >> (8 * (chunk % 4)) & 0xffu);
  }

  // As numbers of T. `exponent`: the scale of their block, of use for mxfp8. `kWhole`: E4M3 as fp16 is
  // not over 2^kHalfShift.
  template <class T, bool kWhole = false>
  DENDRITE_DEVICE Packed<T, 8> numbers(int chunk, uint32_t exponent) const {
    static_assert(sizeof(T) == 2);
    if constexpr (is_rotated(kCodec)) return levels_of<T, kBits>(places(chunk));
    Packed<T, 8> out;
    if constexpr (kBits == 8) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t codes = words[2 * chunk + i / 2];
        if constexpr (kWhole) {
          out.words[i] = e4m3_to_fp16(uint16_t(codes >> (16 * (i % 2))));
          continue;
        }
        out.words[i] = float8_pair<T, kCodec == kE5m2>(
            byte_perm(codes, 0, i % 2 == 0 ? 0x1404 : 0x3424));
        if constexpr (kCodec == kMxfp8) out.words[i] = times_power<T>(out.words[i], exponent);
      }
    } else {
      using Stored = std::conditional_t<kCodec == kBf16, bf16, half_t>;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kCodec == kFp32) {
          out.words[i] = pack2<T>(bits_float(words[8 * chunk + 2 * i]),
                                  bits_float(words[8 * chunk + 2 * i + 1]));
        } else if constexpr (std::is_same_v<Stored, T>) {
          out.words[i] = words[4 * chunk + i];
        } else {
          const float2 two = unpack2<Stored>(words[4 * chunk + i]);
          out.words[i] = pack2<T>(two.x, two.y);
        }
      }
    }
    return out;
  }
};

// The exponent of the block that values 8 * chunk .. 8 * chunk + 7 of an mxfp8 vector are in.
template <int kCodec>
DENDRITE_DEVICE uint32_t block_exponent(const char* scales, int chunk) {
  if constexpr (kCodec != kMxfp8) return 0;
  return uint8_t(scales[chunk / 4]);
}

// Values 8 * chunk .. 8 * chunk + 7 of a vector. `scales`: its scales, of use for mxfp8.
template <class T, int kCodec>
DENDRITE_DEVICE Packed<T, 8> decode8(const char* row, const char* scales, int chunk, int dim) {
  return CodePiece<kCodec, 1>(row, chunk, dim)
      .template numbers<T>(0, block_exponent<kCodec>(scales, chunk));
}

// The positive level at a place.
template <int kBits, int kFirst = 0, int kCount = 1 << (kBits - 1)>
DENDRITE_DEVICE float magnitude(uint32_t place) {
  if constexpr (kCount == 1)
    return kLevelAt<kBits, kFirst>;
  else
    return (place & (kCount / 2)) != 0 ? magnitude<kBits, kFirst + kCount / 2, kCount / 2>(place)
                                       : magnitude<kBits, kFirst, kCount / 2>(place);
}

// The same as floats, exactly.
template <int kCodec>
DENDRITE_DEVICE void decode8_floats(float (&out)[8], const char* row, const char* scales, int chunk,
                                    int dim) {
  if constexpr (kCodec == kFp32) {
    load_floats<8>(out, reinterpret_cast<const float*>(row) + 8 * chunk);
  } else if constexpr (is_rotated(kCodec)) {
    const SignedPlaces at = CodePiece<kCodec, 1>(row, chunk, dim).places(0);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float level = magnitude<kCodecBits[kCodec]>(at.place >> (4 * i) & 7);
      out[i] = at.is_negative(i) ? -level : level;
    }
  } else {
    // 16 bits of either type hold every 8-bit float; a power of two is exact in bf16.
    using Wide = std::conditional_t<kCodec == kFp16, half_t, bf16>;
    unpack<Wide, 8>(out, decode8<Wide, kCodec>(row, scales, chunk, dim));
  }
}

// function(std::integral_constant<int, codec>()), for the codec of a vector.
template <class Function>
DENDRITE_DEVICE void with_codec(int codec, const Function& function) {
  switch (codec) {
    case kFp32: return function(std::integral_constant<int, kFp32>());
    case kBf16: return function(std::integral_constant<int, kBf16>());
    case kFp16: return function(std::integral_constant<int, kFp16>());
    case kE4m3: return function(std::integral_constant<int, kE4m3>());
    case kE5m2: return function(std::integral_constant<int, kE5m2>());
    case kMxfp8: return function(std::integral_constant<int, kMxfp8>());
    case kTq4: return function(std::integral_constant<int, kTq4>());
    case kTq3: return function(std::integral_constant<int, kTq3>());
    default: return function(std::integral_constant<int, kTq2>());
  }
}

// Whether a vector has one scale of its own.
DENDRITE_HOST_DEVICE bool has_token_scale(int codec) { return codec == kE4m3 || codec >= kTq4; }

// It, or 1.
DENDRITE_DEVICE float token_scale(int codec, const char* scale) {
  if (!has_token_scale(codec)) return 1.f;
  return to_float(half_t{*reinterpret_cast<const uint16_t*>(scale)});
}

// The same for numbers of T.
template <class T>
DENDRITE_DEVICE float operand_scale(int codec, const char* scale) {
  const float factor = token_scale(codec, scale);
  return std::is_same_v<T, half_t> && codec == kE4m3 ? factor * (1 << kHalfShift) : factor;
}

}  // namespace dendrite
