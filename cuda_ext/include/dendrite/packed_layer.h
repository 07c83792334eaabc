// Packed pages on a device: K and V of one layer as codes and scales. Plain C++.
//
//   page   data + page * page_bytes; a page holds all layers, this one from byte `at` on
//   cell   16 slots of one kv head, in the order [page_size / 16][kv_heads]:
//          K codes [16][k.row], V codes [16][v.row], K scales [16][k.scales], V scales [16][v.scales]
//
// Codes of a token lie together (on the CPU those of a group of slots do), so that tokens are stored
// side by side without sharing bytes: code d of 8 or 2 bits at bit d * bits of the row, of 3 bits as a
// plane of the low two bits and then one of the third. 4-bit codes are sign and magnitude, 8 in a word:
// nibble i has the place of magnitude i among the positive levels; the highest bits of nibbles 1, 3, 5
// and 7 have the signs (1: negative) of codes 0 to 3, those of nibbles 0, 2, 4 and 6 of codes 4 to 7.
#pragma once

#include "packed_codec.h"

namespace dendrite {

constexpr int kCellSlots = 16;

struct PackedVector {
  int32_t codec;
  int32_t row;     // bytes of a token's codes
  int32_t scales;  // bytes of its scales
};

constexpr PackedVector packed_vector(int codec, int dim) {
  return {codec, dim * kCodecBits[codec] / 8,
          kScaleBytes[codec] == 0 ? 0 : kScaleBytes[codec] * (dim / scale_span(codec, dim))};
}

struct PackedLayer {
  char* data;
  int64_t page_bytes, at;
  int32_t pages, page_size, kv_heads;
  PackedVector k, v;

  DENDRITE_EVERYWHERE constexpr int v_codes() const { return kCellSlots * k.row; }
  DENDRITE_EVERYWHERE constexpr int k_scales() const { return kCellSlots * (k.row + v.row); }
  DENDRITE_EVERYWHERE constexpr int v_scales() const { return k_scales() + kCellSlots * k.scales; }
  DENDRITE_EVERYWHERE constexpr int cell_bytes() const { return v_scales() + kCellSlots * v.scales; }
  DENDRITE_EVERYWHERE constexpr int64_t bytes() const {
    return int64_t{page_size / kCellSlots} * kv_heads * cell_bytes();
  }
};

}  // namespace dendrite
