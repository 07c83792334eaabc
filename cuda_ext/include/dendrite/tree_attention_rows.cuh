// The query rows of one warp in tree attention: what they may see, their softmax state, and what
// becomes of it. Fragments are those of mma.m16n8k16 (see device.cuh); kMTiles tiles of 16 queries.
#pragma once

#include "tree_attention_state.cuh"

namespace dendrite {

constexpr float kLazy = 8.f;  // log2: weights stay below 256 before a maximum is updated

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
        const int position = valid ? p.positions[segment.row_begin + i / p.group] : -1;
        position_[mt][half] = position;
        if (valid) {
          low_position_ = min(low_position_, position);
          high_position_ = max(high_position_, position);
        }
      }
    }
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) {
      low_position_ = min(low_position_, shfl_xor(low_position_, mask));
      high_position_ = max(high_position_, shfl_xor(high_position_, mask));
    }
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
      m[mt][0] = m[mt][1] = kMinusInf;
      l[mt][0] = l[mt][1] = 0.f;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) o[mt][n][0] = o[mt][n][1] = o[mt][n][2] = o[mt][n][3] = 0.f;
    }
  }

  // Query of this lane in row half `half` of an m16 tile.
  DENDRITE_DEVICE int query(int mt, int half) const {
    return first_ + mt * 16 + half * 8 + lane() / 4;
  }
  DENDRITE_DEVICE int num_queries() const { return num_queries_; }

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
    const int lane_slot = lane() % 4 * 2;
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
          const int seen = here ? min(entry.len, position_[mt][half] - entry.pos + 1) : 0;
          const int stop = seen - lane_slot;
#pragma unroll
          for (int c = 0; c < 4; ++c)
            if (slot(c) >= stop) s[mt][2 * j + c / 2][half * 2 + c % 2] = kMinusInf;
          if (p.window == 0) continue;
          const int from = position_[mt][half] - p.window + 1 - entry.pos - lane_slot;
#pragma unroll
          for (int c = 0; c < 4; ++c)
            if (slot(c) < from) s[mt][2 * j + c / 2][half * 2 + c % 2] = kMinusInf;
        }
      }
    }
  }

  // Whether this lane has a score that its row's maximum is too small for.
  template <int kCount>
  DENDRITE_DEVICE bool grows(float scale_log2, const float (&s)[kMTiles][2 * kCount][4]) const {
    bool some = false;
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        some |= has_to_grow(scale_log2, m[mt][half], top<kCount>(s[mt], 0, half));
    return some;
  }

  // Brings the maxima up to entry j of the scores.
  template <int kCount>
  DENDRITE_DEVICE void grow(float scale_log2, const float (&s)[kMTiles][2 * kCount][4], int j) {
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = top<1>(s[mt], 2 * j, half);
        largest = fmaxf(largest, shfl_xor(largest, 1));
        largest = fmaxf(largest, shfl_xor(largest, 2));
        const bool grows = has_to_grow(scale_log2, m[mt][half], largest);
        if (!any_sync(grows)) continue;
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

  // Turns raw scores of entries [first, last) into weights exp2(score - m) and adds them to l.
  template <int kCount>
  DENDRITE_DEVICE void weigh(float scale_log2, float (&s)[kMTiles][2 * kCount][4], int first,
                             int last) {
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float minus_m = m[mt][half] == kMinusInf ? 0.f : -m[mt][half];
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          if (j < first || j >= last) continue;
          float w[4];
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            float& score = s[mt][2 * j + c / 2][half * 2 + c % 2];
            w[c] = score = exp2_fast(fmaf(score, scale_log2, minus_m));
          }
          l[mt][half] += (w[0] + w[1]) + (w[2] + w[3]);
        }
      }
    }
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
    for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        l[mt][half] += shfl_xor(l[mt][half], 1);  // the four lanes of a row hold parts of it
        l[mt][half] += shfl_xor(l[mt][half], 2);
        const int i = query(mt, half);
        if (i >= num_queries_) continue;
        if (segment.slot < 0)
          write_out(p, query_offset(p, segment.row_begin, i, head, kDim), mt, half);
        else
          write_partial(PartialView<kQTile, kDim>(p, segment.slot, head), segment.first_query + i, mt,
                        half);
      }
    }
  }

 private:
  static DENDRITE_DEVICE int lane() { return threadIdx.x % 32; }

  // Slot of an entry that score c of a row belongs to, behind the first slot of the lane.
  static constexpr DENDRITE_DEVICE int slot(int c) { return c / 2 * 8 + c % 2; }

  // The largest of this lane's raw scores of a row in kCount entries.
  template <int kCount, int kAll>
  static DENDRITE_DEVICE float top(const float (&s)[kAll][4], int n, int half) {
    float top = kMinusInf;
#pragma unroll
    for (int i = 0; i < 2 * kCount; ++i)
      top = fmaxf(top, fmaxf(s[n + i][half * 2], s[n + i][half * 2 + 1]));
    return top;
  }

  static DENDRITE_DEVICE bool has_to_grow(float scale_log2, float m, float top) {
    return m == kMinusInf ? top > kMinusInf : fmaf(top, scale_log2, -m) > kLazy;
  }

  DENDRITE_DEVICE void write_out(const TreeAttentionParams& p, size_t offset, int mt,
                                 int half) const {
    T* out = static_cast<T*>(p.out) + offset + lane() % 4 * 2;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n)
      *reinterpret_cast<uint32_t*>(out + n * 8) =
          pack2<T>(normalised(o[mt][n][half * 2], l[mt][half]),
                   normalised(o[mt][n][half * 2 + 1], l[mt][half]));
  }

  template <class Partial>
  DENDRITE_DEVICE void write_partial(const Partial& partial, int i, int mt, int half) const {
    if (lane() % 4 == 0) {
      partial.ml[2 * i] = m[mt][half];
      partial.ml[2 * i + 1] = l[mt][half];
    }
    if (m[mt][half] == kMinusInf) return;  // the merge does not look at o then
    float* to = partial.o + size_t(i) * kDim + lane() % 4 * 2;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n)
      *reinterpret_cast<float2*>(to + n * 8) =
          make_float2(o[mt][n][half * 2], o[mt][n][half * 2 + 1]);
  }

  int first_, num_queries_, low_position_, high_position_;
  int position_[kMTiles][2];
};

}  // namespace dendrite
