// The queries of one warp of tree_attention_few.cuh: what they may see, their softmax state, and what
// becomes of it. Of scores [16 slots, 8 queries] a lane has slots g and g + 8 and queries 2 t and 2 t + 1
// of each tile of 8, with g = lane / 4 and t = lane % 4.
#pragma once

#include "tree_attention_rows.cuh"
#include "vectors.cuh"

namespace dendrite {

template <class T, int kDim, int kTiles>
class FewQueriesRows {
  static constexpr int kProducts = kDim / 16;

 public:
  using Scores = float[kTiles][4];
  uint32_t q[kTiles][kDim / 8];  // of query g: the values that this lane has of keys
  float o[kTiles][kProducts][4];

  DENDRITE_DEVICE explicit FewQueriesRows(const TreeAttentionParams& p) : p_(p) {}

  // With `as_fp16`, queries become fp16, all over a power of two that brings them into its range.
  DENDRITE_DEVICE void start(const WorkSegment& segment, bool as_fp16) {
    num_queries_ = segment.num_rows * p_.group;
    low_position_ = 0x7fffffff;
    high_position_ = -1;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int i = query(tile, c);
        const bool there = i < num_queries_;
        position_[tile][c] = there ? p_.positions[segment.row_begin + row_of(p_, i)] : -1;
        if (there) low_position_ = min(low_position_, position_[tile][c]);
        high_position_ = max(high_position_, position_[tile][c]);
        m_[tile][c] = kNoMaximum;
        l_[tile][c] = 0.f;
      }
      const int i = 8 * tile + g();
      const bool valid = i < num_queries_;
      const T* from = static_cast<const T*>(p_.q) + t() * (kDim / 4) +
                      (valid ? query_offset(p_, segment.row_begin, i, head(), kDim) : 0);
#pragma unroll
      for (int chunk = 0; chunk < kDim / 32; ++chunk) {
        const auto part = load_packed<T, 8>(from + 8 * chunk);
#pragma unroll
        for (int w = 0; w < 4; ++w)
          q[tile][4 * chunk + w] = valid ? part.words[w] : 0;
      }
#pragma unroll
      for (int n = 0; n < kProducts; ++n)
        o[tile][n][0] = o[tile][n][1] = o[tile][n][2] = o[tile][n][3] = 0.f;
    }
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2) {
      low_position_ = min(low_position_, shfl_xor(low_position_, mask));
      high_position_ = max(high_position_, shfl_xor(high_position_, mask));
    }
    score_unit_ = p_.scale_log2;
    if constexpr (std::is_same_v<T, bf16>) {
      if (as_fp16) make_fp16();
    }
  }

  // What a score is multiplied with, besides scales.
  DENDRITE_DEVICE float score_unit() const { return score_unit_; }

  // Hides what rows may not see.
  DENDRITE_DEVICE void mask(const WorkEntry& entry, Scores& s) const {
    const int begin = first_reader(entry) * p_.group, end = end_of_readers(entry) * p_.group;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int i = query(tile, c);
        if (i < begin || i >= end) s[tile][c] = s[tile][2 + c] = kMinusInf;
      }
    }
    if (entry.len == kUnit && entry.pos + kUnit - 1 <= low_position_ &&
        (p_.window == 0 || entry.pos > high_position_ - p_.window))
      return;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int seen = position_[tile][c] - entry.pos, stop = min(entry.len, seen + 1);
        const int from = p_.window > 0 ? seen - p_.window + 1 : 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int slot = g() + 8 * half;
          if (slot >= stop || slot < from) s[tile][2 * half + c] = kMinusInf;
        }
      }
    }
  }

  // Turns a pair's scores, in log2 units, into weights, and counts them.
  DENDRITE_DEVICE void weigh(const Scores (&s)[2], Scores (&w)[2]) {
    float sums[kTiles][2];
    if (any_sync(weights(s, w, sums))) {
      grow(s, sums);
      weights(s, w, sums);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      l_[tile][0] += sums[tile][0];
      l_[tile][1] += sums[tile][1];
    }
  }

  // `unit`: what the output is multiplied with.
  DENDRITE_DEVICE void finish(const WorkSegment& segment, float unit) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) l_[tile][c] += shfl_xor(l_[tile][c], mask);
        const int i = query(tile, c);
        if (i >= num_queries_) continue;
        if (segment.slot < 0)
          write_out(segment.row_begin, i, tile, c, unit);
        else
          write_partial(segment, i, tile, c, unit);
      }
    }
  }

 private:
  static DENDRITE_DEVICE int lane() { return threadIdx.x % 32; }
  static DENDRITE_DEVICE int g() { return lane() / 4; }
  static DENDRITE_DEVICE int t() { return lane() % 4; }
  static DENDRITE_DEVICE int head() { return blockIdx.y; }
  // Query of this lane's column c of a tile.
  static DENDRITE_DEVICE int query(int tile, int c) { return 8 * tile + 2 * t() + c; }

  // Weights of a pair's scores, and this lane's sums of them; whether one of these is too large.
  DENDRITE_DEVICE bool weights(const Scores (&s)[2], Scores (&w)[2], float (&sums)[kTiles][2]) const {
    bool grows = false;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) w[j][tile][i] = exp2_fast(s[j][tile][i] - m_[tile][i % 2]);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        sums[tile][c] =
            (w[0][tile][c] + w[0][tile][2 + c]) + (w[1][tile][c] + w[1][tile][2 + c]);
        grows |= sums[tile][c] > kLargeWeight<half_t>;
      }
    }
    return grows;
  }

  // Brings the maxima of those queries up to the scores that have too large a sum in some lane.
  DENDRITE_DEVICE void grow(const Scores (&s)[2], const float (&sums)[kTiles][2]) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const bool grows = (ballot(sums[tile][c] > kLargeWeight<half_t>) & 0x11111111u << t()) != 0;
        float largest = fmaxf(fmaxf(s[0][tile][c], s[0][tile][2 + c]),
                              fmaxf(s[1][tile][c], s[1][tile][2 + c]));
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) largest = fmaxf(largest, shfl_xor(largest, mask));
        const float to = grows ? largest : m_[tile][c];
        const float factor = grows ? exp2_fast(m_[tile][c] - to) : 1.f;
        m_[tile][c] = to;
        l_[tile][c] *= factor;
#pragma unroll
        for (int n = 0; n < kProducts; ++n) {
          o[tile][n][c] *= factor;
          o[tile][n][2 + c] *= factor;
        }
      }
    }
  }

  DENDRITE_DEVICE void make_fp16() {
    float largest = 0.f;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i) {
        const float2 two = unpack2<bf16>(q[tile][i]);
        largest = fmaxf(largest, fmaxf(fabsf(two.x), fabsf(two.y)));
      }
    // 2^15 fits. No more than this: rows beside one that is not finite must keep theirs.
    const int above = min(int(float_bits(warp_max(largest)) >> 23) - (127 + 14), 6);
    const float down = above > 0 ? bits_float(uint32_t(127 - above) << 23) : 1.f;
    if (above > 0) score_unit_ *= bits_float(uint32_t(127 + above) << 23);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i) {
        const float2 two = unpack2<bf16>(q[tile][i]);
        q[tile][i] = pack2<half_t>(two.x * down, two.y * down);
      }
  }

  DENDRITE_DEVICE void write_out(int row_begin, int i, int tile, int c, float unit) const {
    const float scale = inverse(l_[tile][c]) * unit;
    T* out = static_cast<T*>(p_.out) + query_offset(p_, row_begin, i, head(), kDim) + g() * (kDim / 8);
#pragma unroll
    for (int chunk = 0; chunk < kDim / 64; ++chunk) {
      float values[8];
#pragma unroll
      for (int j = 0; j < 8; ++j)
        values[j] = o[tile][4 * chunk + j / 2][j % 2 * 2 + c] * scale;
      store_floats<8>(out + 8 * chunk, values);
    }
  }

  // See tree_attention_state.cuh for the order of the values.
  DENDRITE_DEVICE void write_partial(const WorkSegment& segment, int i, int tile, int c,
                                     float unit) const {
    const PartialView<8 * kTiles, kDim> partial(p_, segment.slot, head());
    const int at = segment.first_query + i;
    const bool none = m_[tile][c] == kNoMaximum;
    if (g() == 0)
      *reinterpret_cast<float2*>(partial.ml + 2 * at) =
          make_float2(none ? kMinusInf : m_[tile][c], l_[tile][c]);
    if (none) return;  // the merge does not look at o then
    float* to = partial.o + size_t(at) * kDim;
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
      const int value = g() * (kDim / 8) + 2 * n;
      *reinterpret_cast<float2*>(to + value / 16 * 16 + value % 8 * 2 + value % 16 / 8 * 2) =
          make_float2(o[tile][n][c] * unit, o[tile][n][2 + c] * unit);
    }
  }

  const TreeAttentionParams& p_;
  int num_queries_, low_position_, high_position_;
  int position_[kTiles][2];
  float score_unit_;
  float m_[kTiles][2], l_[kTiles][2];  // of queries 2 t and 2 t + 1 of a tile
};

}  // namespace dendrite
