// Packed pages: K or V as codes and scales. The layout is that of dendrite_engine/kernels/packed.py:
//   page       data + page * page_stride; a page holds all layers
//   K codes    page + codes + head * head_stride, groups [page_size / 16][dim] of 16 slots each
//   V codes    the same, groups [page_size][dim / 16] of 16 dimensions each
//   scales     page + scales + head * head_stride, [items][page_size]
// A group of 16 codes takes 2 * bits bytes. Plain data only, as in kernels.h.
#pragma once

#include <cstdint>

namespace dendrite {

enum PackedCodec : int32_t { kFp32, kBf16, kFp16, kE4m3, kE5m2, kMxfp8, kTq4, kTq3, kTq2 };
constexpr int kPackedCodecs = 9;
constexpr int kGroup = 16;       // codes that lie together
constexpr int kMaxPackedDim = 512;
constexpr int kCodecBits[kPackedCodecs] = {32, 16, 16, 8, 8, 8, 4, 3, 2};
constexpr int kScaleBytes[kPackedCodecs] = {0, 0, 0, 2, 0, 1, 2, 2, 2};

// Dimensions that share a scale, for heads of `dim`.
constexpr int scale_span(int codec, int dim) { return codec == kMxfp8 ? 32 : dim; }

// Lloyd-Max levels of a standard normal variable and the limits between them, positive halves
// (kernels: the levels of codes 2^(bits-1) and up); negative ones mirror them.
constexpr float kLevels4[8] = {0.128395f, 0.388048f, 0.656759f, 0.942340f,
                               1.256231f, 1.618046f, 2.069017f, 2.732590f};
constexpr float kLevels3[4] = {0.245094f, 0.756005f, 1.343909f, 2.151946f};
constexpr float kLevels2[2] = {0.452780f, 1.510418f};
constexpr float kLimits4[7] = {0.258222f, 0.522404f, 0.799550f, 1.099286f,
                               1.437139f, 1.843532f, 2.400803f};
constexpr float kLimits3[3] = {0.500550f, 1.049957f, 1.747927f};
constexpr float kLimits2[1] = {0.981599f};

// K or V of one layer.
struct PackedSide {
  uint8_t* data;
  int64_t pages, page_stride, head_stride, codes, scales;
  int32_t codec;
  int32_t page_size, kv_heads, dim;
  const float* signs;  // [kv_heads, dim] of the rotation, or null
  const float* mean;   // [kv_heads, dim] subtracted before storing, or null
  // Pages with a place in `first_index` (not -1) lie there in `first`, in the basis of these codes.
  const int32_t* first_index;
  const PackedSide* first;

  int32_t first_place(int64_t page) const { return first == nullptr ? -1 : first_index[page]; }
  uint8_t* codes_of(int64_t page, int64_t head) const {
    return data + page * page_stride + codes + head * head_stride;
  }
  uint8_t* scales_of(int64_t page, int64_t head) const {
    return data + page * page_stride + scales + head * head_stride;
  }
};

}  // namespace dendrite
