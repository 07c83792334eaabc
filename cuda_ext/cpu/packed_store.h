// One vector into packed pages: rotate, quantise, pack, scale. Bit for bit what the formats in
// dendrite_engine/cache/formats compute: sums are halves added onto each other, no step is fused.
#pragma once

#include "packed.h"
#include "packed_codecs.h"

namespace dendrite::DENDRITE_ISA {
namespace {

// Unnormalised Walsh-Hadamard transform, distance 1 first.
DENDRITE_INLINE void hadamard(float* x, int dim) {
  for (int distance = 1; distance < dim; distance *= 2)
    for (int i = 0; i < dim; i += 2 * distance)
      for (int j = i; j < i + distance; ++j) {
        const float a = x[j], b = x[j + distance];
        x[j] = a + b;
        x[j + distance] = a - b;
      }
}

void rotate(const float* x, const float* signs, int dim, bool back, float* out) {
  const float norm = float(1.0 / __builtin_sqrt(double(dim)));
  for (int d = 0; d < dim; ++d) out[d] = back ? x[d] : x[d] * signs[d];
  hadamard(out, dim);
  for (int d = 0; d < dim; ++d) out[d] = back ? out[d] * norm * signs[d] : out[d] * norm;
}

// Destroys x.
DENDRITE_INLINE float tree_sum(float* x, int dim) {
  while (dim > 1) {
    dim /= 2;
    for (int i = 0; i < dim; ++i) x[i] += x[i + dim];
  }
  return x[0];
}

DENDRITE_INLINE uint32_t word_of(float x) {
  uint32_t word;
  __builtin_memcpy(&word, &x, sizeof word);
  return word;
}
DENDRITE_INLINE float float_of(uint32_t word) {
  float x;
  __builtin_memcpy(&x, &word, sizeof x);
  return x;
}

// Nearest fp16, ties to even.
DENDRITE_INLINE uint16_t half_of(float x) {
  const uint32_t word = word_of(x), sign = (word >> 16) & 0x8000, size = word & 0x7fffffff;
  if (size >= 0x7f800000) return uint16_t(sign | (size > 0x7f800000 ? 0x7e00 : 0x7c00));
  if (size >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to infinity
  if (size < 0x38800000) {                                  // below 2^-14: steps of 2^-24
    const float moved = float_of(size) + 0.5f;              // whose last place is 2^-24
    return uint16_t(sign | (word_of(moved) - word_of(0.5f)));
  }
  const uint32_t odd = (size >> 13) & 1;
  return uint16_t(sign | ((size - (112u << 23) + 0xfff + odd) >> 13));
}

DENDRITE_INLINE uint16_t bfloat_of(float x) {
  const uint32_t word = word_of(x);
  if ((word & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

// Nearest E4M3, ties to even, saturating at 448; NaN stays NaN.
DENDRITE_INLINE uint8_t e4m3_of(float x) {
  const uint32_t word = word_of(x), sign = (word >> 24) & 0x80, size = word & 0x7fffffff;
  if (size > 0x7f800000) return 0x7f;
  if (size >= 0x43e00000) return uint8_t(sign | 0x7e);  // 448
  if (size < 0x3c800000) {                              // below 2^-6: steps of 2^-9
    const float moved = float_of(size) + 16384.0f;      // whose last place is 2^-9
    return uint8_t(sign | (word_of(moved) - word_of(16384.0f)));
  }
  const uint32_t odd = (size >> 20) & 1;
  return uint8_t(sign | ((size - (120u << 23) + 0x7ffff + odd) >> 20));
}

// Nearest E5M2 of the fp32 number (not of its fp16), ties to even, saturating at 57344.
DENDRITE_INLINE uint8_t e5m2_of(float x) {
  const uint32_t word = word_of(x), sign = (word >> 24) & 0x80, size = word & 0x7fffffff;
  if (size >= 0x7f800000) return 0x7f;
  if (size >= 0x47600000) return uint8_t(sign | 0x7b);  // 57344
  if (size < 0x38800000) {                              // below 2^-14: steps of 2^-16
    const float moved = float_of(size) + 128.0f;        // whose last place is 2^-16
    return uint8_t(sign | (word_of(moved) - word_of(128.0f)));
  }
  const uint32_t odd = (size >> 21) & 1;
  return uint8_t(sign | ((size - (112u << 23) + 0xfffff + odd) >> 21));
}

DENDRITE_INLINE uint32_t largest_size(const float* x, int dim) {
  uint32_t largest = 0;  // as integers: NaN is above infinity, infinity above numbers
  for (int d = 0; d < dim; ++d) {
    const uint32_t size = word_of(x[d]) & 0x7fffffff;
    largest = size > largest ? size : largest;
  }
  return largest;
}

// Codes of a vector, one a word, and its scales.
struct Quantised {
  int32_t* codes;
  uint16_t scale[kMaxPackedDim / 32];
};

template <int Bits>
void quantise_tq(const float* x, const float* signs, int dim, float* scratch, Quantised& out) {
  constexpr int half = 1 << (Bits - 1);
  float *y = scratch, *part = scratch + dim;
  for (int d = 0; d < dim; ++d) part[d] = x[d] * x[d];
  const float norm = __builtin_sqrtf(tree_sum(part, dim));
  const float inverse = norm == 0.0f ? 0.0f : 1.0f / norm;
  for (int d = 0; d < dim; ++d) y[d] = x[d] * signs[d];
  hadamard(y, dim);
  for (int d = 0; d < dim; ++d) y[d] *= inverse;
  for (int d = 0; d < dim; ++d) out.codes[d] = y[d] >= 0.0f;
  for (int i = 0; i < half - 1; ++i) {
    const float limit = Bits == 4 ? kLimits4[i] : Bits == 3 ? kLimits3[i] : kLimits2[0];
    for (int d = 0; d < dim; ++d) out.codes[d] += int(y[d] >= limit) + int(y[d] >= -limit);
  }
  float levels[1 << Bits];
  for (int i = 0; i < 1 << Bits; ++i) levels[i] = level_of<Bits>(i);
  for (int d = 0; d < dim; ++d) part[d] = y[d] * levels[out.codes[d]];
  const float along = tree_sum(part, dim);
  for (int d = 0; d < dim; ++d) part[d] = levels[out.codes[d]] * levels[out.codes[d]];
  const float root = float(1.0 / __builtin_sqrt(double(dim)));
  out.scale[0] = half_of(norm * root * (along / tree_sum(part, dim)));
}

void quantise_e4m3(const float* x, int dim, Quantised& out) {
  const float largest = float_of(largest_size(x, dim));
  uint16_t scale = half_of(largest / 448.0f);
  if (half_float(scale) * 448.0f < largest) ++scale;  // rounded down: one step up
  const float inverse = scale == 0 ? 0.0f : 1.0f / half_float(scale);
  for (int d = 0; d < dim; ++d) out.codes[d] = e4m3_of(x[d] * inverse);
  out.scale[0] = scale;
}

void quantise_mxfp8(const float* x, int dim, Quantised& out) {
  for (int block = 0; block < dim / 32; ++block, x += 32) {
    const uint32_t ratio = word_of(float_of(largest_size(x, 32)) / 448.0f);
    uint32_t exponent = (ratio + 0x7fffff) >> 23;  // of the next power of two
    exponent = exponent < 1 ? 1 : exponent > 255 ? 255 : exponent;
    const float inverse = exponent < 254 ? float_of((254 - exponent) << 23) : 0.0f;
    for (int d = 0; d < 32; ++d) out.codes[32 * block + d] = e4m3_of(x[d] * inverse);
    out.scale[block] = uint16_t(exponent);
  }
}

void quantise(const PackedSide& side, const float* x, const float* signs, float* scratch,
              Quantised& out) {
  const int dim = side.dim;
  switch (side.codec) {
    case kFp32: __builtin_memcpy(out.codes, x, sizeof(float) * dim); break;
    case kBf16: for (int d = 0; d < dim; ++d) out.codes[d] = bfloat_of(x[d]); break;
    case kFp16: for (int d = 0; d < dim; ++d) out.codes[d] = half_of(x[d]); break;
    case kE4m3: quantise_e4m3(x, dim, out); break;
    case kE5m2: for (int d = 0; d < dim; ++d) out.codes[d] = e5m2_of(x[d]); break;
    case kMxfp8: quantise_mxfp8(x, dim, out); break;
    case kTq4: quantise_tq<4>(x, signs, dim, scratch, out); break;
    case kTq3: quantise_tq<3>(x, signs, dim, scratch, out); break;
    default: quantise_tq<2>(x, signs, dim, scratch, out);
  }
}

// Code `place` of a group; the other codes keep their bits.
DENDRITE_INLINE void put_bits(uint8_t* group, int place, int bits, int32_t code) {
  const int per_byte = 8 / bits, shift = place % per_byte * bits;
  uint8_t& byte = group[place / per_byte];
  byte = uint8_t((byte & ~(((1 << bits) - 1) << shift)) | (code << shift));
}
DENDRITE_INLINE void put_code(uint8_t* group, int place, int bits, int32_t code) {
  if (bits >= 8)
    __builtin_memcpy(group + place * bits / 8, &code, bits / 8);  // little-endian
  else if (bits == 3) {
    put_bits(group, place, 2, code & 3);
    put_bits(group + 4, place, 1, code >> 2);
  } else
    put_bits(group, place, bits, code);
}

template <int Bits>
void put_codes(uint8_t* page, bool is_key, int slot, int dim, const int32_t* codes) {
  if (is_key) {
    uint8_t* group = page + int64_t(slot / kGroup) * dim * 2 * Bits;
    for (int d = 0; d < dim; ++d) put_code(group + d * 2 * Bits, slot % kGroup, Bits, codes[d]);
  } else {
    uint8_t* group = page + int64_t(slot) * (dim / kGroup) * 2 * Bits;
    for (int d = 0; d < dim; ++d) put_code(group + d / kGroup * 2 * Bits, d % kGroup, Bits, codes[d]);
  }
}

void put_vector(const PackedSide& side, bool is_key, int64_t page, int offset, int head,
                const float* x, const float* signs, float* scratch) {
  const int dim = side.dim;
  int32_t codes[kMaxPackedDim];
  Quantised out{codes, {}};
  quantise(side, x, signs, scratch, out);
  uint8_t* to = side.codes_of(page, head);
  switch (kCodecBits[side.codec]) {
    case 32: put_codes<32>(to, is_key, offset, dim, codes); break;
    case 16: put_codes<16>(to, is_key, offset, dim, codes); break;
    case 8: put_codes<8>(to, is_key, offset, dim, codes); break;
    case 4: put_codes<4>(to, is_key, offset, dim, codes); break;
    case 3: put_codes<3>(to, is_key, offset, dim, codes); break;
    default: put_codes<2>(to, is_key, offset, dim, codes);
  }
  uint8_t* strip = side.scales_of(page, head);
  const int width = kScaleBytes[side.codec];
  for (int i = 0; width > 0 && i < dim / scale_span(side.codec, dim); ++i)
    __builtin_memcpy(strip + (i * side.page_size + offset) * width, &out.scale[i], width);
}

void store_packed(const PackedSide& side, bool is_key, int64_t slot, int head, const float* x,
                  float* scratch) {
  const int dim = side.dim, offset = int(slot % side.page_size);
  const int64_t page = slot / side.page_size, row = int64_t(head) * dim;
  const float* signs = side.signs == nullptr ? nullptr : side.signs + row;
  if (side.mean != nullptr) {
    float* centred = scratch + 2 * dim;
    for (int d = 0; d < dim; ++d) centred[d] = x[d] - side.mean[row + d];
    x = centred;
  }
  const int32_t place = side.first_place(page);
  if (place < 0) return put_vector(side, is_key, page, offset, head, x, signs, scratch);
  if (signs != nullptr) {
    rotate(x, signs, dim, false, scratch + 3 * dim);
    x = scratch + 3 * dim;
  }
  put_vector(*side.first, is_key, place, offset, head, x, nullptr, scratch);
}

}  // namespace
}  // namespace dendrite::DENDRITE_ISA
