// The query rows of one warp in tree attention: what they may see, their softmax state, and what
// becomes of it. Fragments are those of mma.m16n8k16 (see device.cuh); kMTiles tiles of 16 queries.
#pragma once

#include "tree_attention_state.cuh"

namespace dendrite {

// A maximum is updated where the weights that a lane has of an entry add up to more. With scales of
// packed values they have to stay within the range of T.
template <class T>
constexpr float kLargeWeight = std::is_same_v<T, half_t> ? 16.f : 256.f;
// The maximum of a row that saw nothing: a weight in units of it is too large whatever the score.
constexpr float kNoMaximum = -1e30f;

// Lane t of four gets word t of each of them, in their order.
DENDRITE_DEVICE void transpose_quad(uint32_t (&w)[4]) {
#pragma unroll
  for (int mask = 1; mask < 4; mask *= 2) {
    const bool odd = (threadIdx.x & mask) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & mask) != 0) continue;
      const uint32_t other = shfl_xor(odd ? w[i] : w[i + mask], mask);
      w[i] = odd ? other : w[i];
      w[i + mask] = odd ? w[i + mask] : other;
    }
  }
}

template <class T, int kDim, int kMTiles>
class AttentionRows {
 public:
  float m[kMTiles][2], l[kMTiles][2];
  float o[kMTiles][kDim / 8][4];

  // `first`: the warp's first query in the tile.
  DENDRITE_DEVICE void start(const TreeAttentionParams& p, const WorkSegment& segment, int first) {
    first_ = first;
    num_queries_ = segment.num_rows * p.group;
    low_position_ = 0x7fffffff;
    high_position_ = -1;
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = query(mt, half);
        const bool valid = i < num_queries_;
        const int position = valid ? p.positions[segment.row_begin + row_of(p, i)] : -1;
        position_[mt][half] = position;
        if (valid) {
          low_position_ = min(low_position_, position);
          high_position_ = max(high_position_, position);
        }
      }
    }
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) {  // the four lanes of a row have the same
      low_position_ = min(low_position_, shfl_xor(low_position_, mask));
      high_position_ = max(high_position_, shfl_xor(high_position_, mask));
    }
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
      m[mt][0] = m[mt][1] = kNoMaximum;
      l[mt][0] = l[mt][1] = 0.f;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) o[mt][n][0] = o[mt][n][1] = o[mt][n][2] = o[mt][n][3] = 0.f;
    }
  }

  // Query of this lane in row half `half` of an m16 tile.
  DENDRITE_DEVICE int query(int mt, int half) const {
    return first_ + mt * 16 + half * 8 + lane() / 4;
  }

  // The rows' queries as A operands of m16n8k16 products.
  DENDRITE_DEVICE void load_queries(const TreeAttentionParams& p, int row_begin, int head,
                                    uint32_t (&q)[kDim / 16][4]) const {
    static_assert(kMTiles == 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = query(0, half);
      const bool valid = i < num_queries_;
      const T* from = static_cast<const T*>(p.q) + lane() % 4 * 8 +
                      (valid ? query_offset(p, row_begin, i, head, kDim) : 0);
#pragma unroll
      for (int k = 0; k < kDim / 16; k += 2) {
        const uint4 part = valid ? load_16(from + k * 16) : make_uint4(0, 0, 0, 0);
        uint32_t words[4] = {part.x, part.y, part.z, part.w};
        transpose_quad(words);
        q[k][half] = words[0];
        q[k][half + 2] = words[1];
        q[k + 1][half] = words[2];
        q[k + 1][half + 2] = words[3];
      }
    }
  }

  // Whether some of the queries [low, high) read the entry.
  DENDRITE_DEVICE bool reads(const TreeAttentionParams& p, const WorkEntry& entry, int low,
                             int high) const {
    high = min(high, num_queries_);
    return entry.len > 0 && first_reader(entry) * p.group < high &&
           end_of_readers(entry) * p.group > low;
  }
  // Whether this warp's queries read all of the entry.
  DENDRITE_DEVICE bool all_see(const TreeAttentionParams& p, const WorkEntry& entry) const {
    return entry.len == kUnit && all_see(p, first_reader(entry) * p.group,
                                         end_of_readers(entry) * p.group, entry.pos,
                                         entry.pos + kUnit - 1);
  }
  // Whether all of them are among [begin, end) and see all positions from `low` to `high`.
  DENDRITE_DEVICE bool all_see(const TreeAttentionParams& p, int begin, int end, int low,
                               int high) const {
    return begin <= first_ && end >= min(first_ + kMTiles * 16, num_queries_) &&
           high <= low_position_ && (p.window == 0 || low > high_position_ - p.window);
  }

  // Sets the raw scores of kCount entries that a row may not see to -inf.
  template <int kCount, class Entries>
  DENDRITE_DEVICE void mask(const TreeAttentionParams& p, const Entries& entries,
                            float (&s)[kMTiles][2 * kCount][4]) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const WorkEntry entry = entries[j];
      const int begin = first_reader(entry) * p.group;
      const int end = end_of_readers(entry) * p.group;
#pragma unroll
      for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = query(mt, half);
          const bool here = i >= begin && i < end;
          const int stop = here ? min(entry.len, position_[mt][half] - entry.pos + 1) : 0;
          hide(s[mt], j, half, [&](int slot) { return slot >= stop; });
        }
      }
    }
    if (p.window > 0) mask_window<kCount>(p.window, entries, s);
  }

  // Brings the maxima up to entry j of the scores.
  template <int kCount>
  DENDRITE_DEVICE void grow(float scale_log2, const float (&s)[kMTiles][2 * kCount][4], int j) {
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float w[4];
        bool grows = weights(scale_log2, s[mt], j, half, m[mt][half], w) > kLargeWeight<T>;
        if (!any_sync(grows)) continue;
        grows = any_in_quad(grows);
        const float largest = quad_max(top(s[mt], j, half));
        const float to = grows ? largest * scale_log2 : m[mt][half];
        const float factor = grows ? exp2_fast(m[mt][half] - to) : 1.f;
        m[mt][half] = to;
        l[mt][half] *= factor;
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          o[mt][n][half * 2] *= factor;
          o[mt][n][half * 2 + 1] *= factor;
        }
      }
    }
  }

  // A row without a maximum takes that of its first entry, as grow() entry by entry would.
  template <int kCount>
  DENDRITE_DEVICE void begin(float scale_log2, const float (&s)[kMTiles][2 * kCount][4]) {
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float tops[kCount], first = kMinusInf;
        uint32_t seen = 0;
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          tops[j] = top(s[mt], j, half);
          if (tops[j] > kMinusInf) seen |= 1u << j;
        }
        seen |= shfl_xor(seen, 1);
        seen |= shfl_xor(seen, 2);
#pragma unroll
        for (int j = kCount - 1; j >= 0; --j)
          if ((seen >> j & 1) != 0) first = tops[j];
        first = quad_max(first);
        if (m[mt][half] == kNoMaximum && seen != 0) m[mt][half] = first * scale_log2;
      }
    }
  }

  // Turns raw scores of entries [first, last) into weights exp2(score - m) and adds them to `sums`.
  // Returns whether a maximum of this lane's rows has to grow before; then neither is of use.
  template <int kCount>
  DENDRITE_DEVICE bool weigh(float scale_log2, float (&s)[kMTiles][2 * kCount][4], int first,
                             int last, float (&sums)[kMTiles][2]) const {
    bool grows = false;
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          if (j < first || j >= last) continue;
          float w[4];
          const float sum = weights(scale_log2, s[mt], j, half, m[mt][half], w);
          grows |= sum > kLargeWeight<T>;
          sums[mt][half] += sum;
#pragma unroll
          for (int c = 0; c < 4; ++c) s[mt][2 * j + c / 2][half * 2 + c % 2] = w[c];
        }
      }
    }
    return grows;
  }

  // Weights of entry j as the A operand of an m16n8k16 product.
  template <int kCount>
  static DENDRITE_DEVICE void pack(const float (&s)[2 * kCount][4], int j, uint32_t (&a)[4]) {
    a[0] = pack2<T>(s[2 * j][0], s[2 * j][1]);
    a[1] = pack2<T>(s[2 * j][2], s[2 * j][3]);
    a[2] = pack2<T>(s[2 * j + 1][0], s[2 * j + 1][1]);
    a[3] = pack2<T>(s[2 * j + 1][2], s[2 * j + 1][3]);
  }

  template <int kQTile>
  DENDRITE_DEVICE void finish(const TreeAttentionParams& p, const WorkSegment& segment, int head) {
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        l[mt][half] += shfl_xor(l[mt][half], 1);  // the four lanes of a row hold parts of it
        l[mt][half] += shfl_xor(l[mt][half], 2);
      }
    if (segment.slot < 0)
      write_out(p, segment.row_begin, head);
    else
      write_partial(PartialView<kQTile, kDim>(p, segment.slot, head), segment.first_query);
  }

 private:
  static DENDRITE_DEVICE int lane() { return threadIdx.x % 32; }

  // Sets the scores of entry j to -inf whose slots `hidden` has.
  template <int kAll, class Hidden>
  static DENDRITE_DEVICE void hide(float (&s)[kAll][4], int j, int half, const Hidden& hidden) {
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if (hidden(lane() % 4 * 2 + c / 2 * 8 + c % 2)) s[2 * j + c / 2][half * 2 + c % 2] = kMinusInf;
  }

  template <int kCount, class Entries>
  DENDRITE_DEVICE void mask_window(int window, const Entries& entries,
                                   float (&s)[kMTiles][2 * kCount][4]) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int pos = entries[j].pos;
#pragma unroll
      for (int mt = 0; mt < kMTiles; ++mt)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int from = position_[mt][half] - window + 1 - pos;
          hide(s[mt], j, half, [&](int slot) { return slot < from; });
        }
    }
  }

  static DENDRITE_DEVICE float quad_max(float value) {
    value = fmaxf(value, shfl_xor(value, 1));
    return fmaxf(value, shfl_xor(value, 2));
  }
  static DENDRITE_DEVICE bool any_in_quad(bool pred) {
    return (ballot(pred) >> lane() / 4 * 4 & 15) != 0;
  }

  // The largest of this lane's raw scores of a row in entry j.
  template <int kAll>
  static DENDRITE_DEVICE float top(const float (&s)[kAll][4], int j, int half) {
    const float(&a)[4] = s[2 * j], (&b)[4] = s[2 * j + 1];
    return fmaxf(fmaxf(a[half * 2], a[half * 2 + 1]), fmaxf(b[half * 2], b[half * 2 + 1]));
  }

  // This lane's weights of a row in entry j, and their sum.
  template <int kAll>
  static DENDRITE_DEVICE float weights(float scale_log2, const float (&s)[kAll][4], int j, int half,
                                       float m, float (&w)[4]) {
#pragma unroll
    for (int c = 0; c < 4; ++c)
      w[c] = exp2_fast(fmaf(s[2 * j + c / 2][half * 2 + c % 2], scale_log2, -m));
    return (w[0] + w[1]) + (w[2] + w[3]);
  }

  // 16 bytes at a time, which lanes have after an exchange.
  DENDRITE_DEVICE void write_out(const TreeAttentionParams& p, int row_begin, int head) const {
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float scale = inverse(l[mt][half]);
        const int i = query(mt, half);
        T* out = static_cast<T*>(p.out) + query_offset(p, row_begin, i, head, kDim) + lane() % 4 * 8;
#pragma unroll
        for (int n = 0; n < kDim / 8; n += 4) {
          uint32_t words[4];
#pragma unroll
          for (int k = 0; k < 4; ++k)
            words[k] = pack2<T>(o[mt][n + k][half * 2] * scale, o[mt][n + k][half * 2 + 1] * scale);
          transpose_quad(words);
          if (i < num_queries_)
            store_16(out + n * 8, make_uint4(words[0], words[1], words[2], words[3]));
        }
      }
    }
  }

  // See tree_attention_state.cuh for the order of the values.
  template <class Partial>
  DENDRITE_DEVICE void write_partial(const Partial& partial, int first_query) const {
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (query(mt, half) >= num_queries_) continue;
        const int i = first_query + query(mt, half);
        const bool none = m[mt][half] == kNoMaximum;
        if (lane() % 4 == 0)
          *reinterpret_cast<float2*>(partial.ml + 2 * i) =
              make_float2(none ? kMinusInf : m[mt][half], l[mt][half]);
        if (none) continue;  // the merge does not look at o then
        float* to = partial.o + size_t(i) * kDim + lane() % 4 * 4;
#pragma unroll
        for (int n = 0; n < kDim / 8; n += 2)
          *reinterpret_cast<float4*>(to + n * 8) =
              make_float4(o[mt][n][half * 2], o[mt][n][half * 2 + 1], o[mt][n + 1][half * 2],
                          o[mt][n + 1][half * 2 + 1]);
      }
    }
  }

  int first_, num_queries_, low_position_, high_position_;
  int position_[kMTiles][2];
};

}  // namespace dendrite
