// Packed pages: K or V as codes and scales. The layout is that of dendrite_engine/kernels/packed.py:
//   page       data + page * page_stride; a page holds all layers
//   K codes    page + codes + head * head_stride, groups [page_size / 16][dim] of 16 slots each
//   V codes    the same, groups [page_size][dim / 16] of 16 dimensions each
//   scales     page + scales + head * head_stride, [items][page_size]
// A group of 16 codes takes 2 * bits bytes. Plain data only, as in kernels.h.
#pragma once

#include <cstdint>

#include "../include/dendrite/packed_codec.h"

namespace dendrite {

constexpr int kGroup = 16;  // codes that lie together
constexpr int kMaxPackedDim = 512;

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
