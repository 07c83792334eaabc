// Packed pages in the kernels of tree_attention.cuh and tree_attention_f32.cuh: codes become numbers
// on their way into shared memory, and nowhere else. In 16 bits a vector's own scale stays apart, in
// fp32: scores are multiplied with those of keys, weights with those of values.
#pragma once

#include "packed_decode.cuh"
#include "tree_attention.cuh"
#include "tree_attention_f32.cuh"
#include "tree_attention_packed_params.h"

namespace dendrite {

// Where the 16 slots lie of which an entry has the first ones.
DENDRITE_DEVICE const char* entry_cell(const TreeAttentionPackedParams& p, const WorkEntry& entry,
                                       int head) {
  const int page = entry.slot >> p.page_shift;
  const int unit = (entry.slot - (page << p.page_shift)) / kCellSlots;
  return p.layer.data + page * p.layer.page_bytes + p.layer.at +
         (int64_t(unit) * p.kv_heads + head) * p.layer.cell_bytes();
}

template <class T, int kDim, int kThreads, int kTile>
struct PackedReader {
  using Params = TreeAttentionPackedParams;
  static constexpr bool kScaled = true;
  static constexpr int kSlots = kTile * kUnit;
  static constexpr int kSharedBytes = 4 * kSlots * int(sizeof(float));  // K and V, two stages
  static constexpr int kStride = AttentionShared<kDim, kTile>::kStride;

  const Params& p;
  float* scales;

  DENDRITE_DEVICE PackedReader(const Params& p, char* smem)
      : p(p), scales(reinterpret_cast<float*>(smem)) {}

  DENDRITE_DEVICE void load_tile(const WorkEntry* entries, int head, T* keys, T* values,
                                 int stage) const {
    const PackedLayer& layer = p.layer;
    with_codec(layer.k.codec, [&](auto codec) {
      load_side<codec.value>(entries, head, 0, layer.k_scales(), layer.k, keys);
    });
    with_codec(layer.v.codec, [&](auto codec) {
      load_side<codec.value>(entries, head, layer.v_codes(), layer.v_scales(), layer.v, values);
    });
    for (int i = threadIdx.x; i < 2 * kSlots; i += kThreads) {
      const bool is_key = i < kSlots;
      const int slot = i % kSlots, r = slot % kUnit;
      const WorkEntry entry = entries[slot / kUnit];
      const char* cell = entry_cell(p, entry, head);
      const PackedVector& side = is_key ? layer.k : layer.v;
      const char* scale = cell + (is_key ? layer.k_scales() : layer.v_scales()) + r * side.scales;
      scales[stage * 2 * kSlots + i] = r < entry.len ? operand_scale<T>(side.codec, scale) : 0.f;
    }
  }

  template <int kCount>
  DENDRITE_DEVICE void scale_scores(float (&s)[2 * kCount][4], int stage, int first) const {
    multiply<kCount>(s, scales + stage * 2 * kSlots + first * kUnit);
  }
  template <int kCount>
  DENDRITE_DEVICE void scale_weights(float (&s)[2 * kCount][4], int stage, int first) const {
    multiply<kCount>(s, scales + (stage * 2 + 1) * kSlots + first * kUnit);
  }

 private:
  template <int kCodec>
  DENDRITE_DEVICE void load_side(const WorkEntry* entries, int head, int codes_at, int scales_at,
                                 const PackedVector& side, T* to) const {
    constexpr int kChunks = kDim / 8;
#pragma unroll 1
    for (int i = threadIdx.x; i < kSlots * kChunks; i += kThreads) {
      const int row = i / kChunks, chunk = i % kChunks, r = row % kUnit;
      const WorkEntry entry = entries[row / kUnit];
      Packed<T, 8> numbers{};
      if (r < entry.len) {
        const char* cell = entry_cell(p, entry, head);
        numbers = decode8<T, kCodec>(cell + codes_at + r * side.row,
                                     cell + scales_at + r * side.scales, chunk, kDim);
      }
      store_packed<T, 8>(to + row * kStride + chunk * 8, numbers);
    }
  }

  // Columns of the scores of kCount entries with the numbers of their slots.
  template <int kCount>
  static DENDRITE_DEVICE void multiply(float (&s)[2 * kCount][4], const float* by) {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < 2 * kCount; ++n) {
      const float2 factor = *reinterpret_cast<const float2*>(by + n * 8 + column);
      s[n][0] *= factor.x;
      s[n][1] *= factor.y;
      s[n][2] *= factor.x;
      s[n][3] *= factor.y;
    }
  }
};

template <int kDim>
struct PackedReaderF32 {
  using Params = TreeAttentionPackedParams;
  const Params& p;

  DENDRITE_DEVICE void load(const WorkEntry& entry, int head, int r, int chunk, float (&k)[8],
                            float (&v)[8]) const {
    const PackedLayer& layer = p.layer;
    const char* cell = entry_cell(p, entry, head);
    load_side(layer.k, cell, cell + layer.k_scales(), r, chunk, k);
    load_side(layer.v, cell + layer.v_codes(), cell + layer.v_scales(), r, chunk, v);
  }

 private:
  static DENDRITE_DEVICE void load_side(const PackedVector& side, const char* codes,
                                        const char* scales, int r, int chunk, float (&out)[8]) {
    with_codec(side.codec, [&](auto codec) {
      decode8_floats<codec.value>(out, codes + r * side.row, scales + r * side.scales, chunk, kDim);
    });
    const float scale = token_scale(side.codec, scales + r * side.scales);
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] *= scale;
  }
};

}  // namespace dendrite
