// Tree attention on tensor cores (mma.sync m16n8k16, bf16 or fp16 with fp32 accumulation).
//
// A block of threads takes segments of the work list one after another. A segment is a tile of up
// to 64 * kMTiles queries (consecutive rows times the query heads of one kv head) and a run of
// entries (16 slots of one page each) that some of those rows read. K and V of four entries are
// loaded together by cp.async, two tiles deep, and used by all queries of the tile: a page is read
// once per tile, whatever the tree. Each warp owns 16 * kMTiles queries and skips entries that none
// of them reads. Scores are masked by reader, position and window. Softmax is updated entry by
// entry, the maximum only when it grew by more than kLazy, so a row's sequence of operations is
// that of its own entries (see attention_work.h).
#pragma once

#include "tree_attention_state.cuh"

namespace dendrite {

constexpr int kAttentionThreads = 128;
constexpr float kLazy = 8.f;  // log2: probabilities stay below 256 before the maximum is updated

template <int kDim, int kTile>
struct AttentionShared {
  static constexpr int kStride = kDim + 8;  // elements; the pad keeps ldmatrix free of conflicts
  static constexpr int kTileBytes = kTile * kUnit * kStride * 2;
  static constexpr int kEntriesAt = 4 * kTileBytes;  // K and V, two stages
  static constexpr int kPositionsAt = kEntriesAt + 4 * kTile * int(sizeof(WorkEntry));
  static constexpr int kBytes = kPositionsAt + 128 * int(sizeof(int32_t));
};

template <class T, int kDim, int kMTiles, int kTile>
class AttentionWarp {
  using Shared = AttentionShared<kDim, kTile>;
  static constexpr int kQTile = 64 * kMTiles;
  static constexpr int kSteps = kDim / 16;
  static constexpr int kGroup = kTile / kMTiles;  // entries that are scored together

 public:
  DENDRITE_DEVICE AttentionWarp(const TreeAttentionParams& p, char* smem)
      : p_(p), smem_(smem) {}

  // Takes one segment; returns the worker's next one, or -1.
  DENDRITE_DEVICE int run(int index) {
    const WorkSegment segment = read_segment(p_, index);
    const int count = segment.count;
    if (count == 0) return -1;
    const auto* entries = reinterpret_cast<const WorkEntry*>(p_.work + segment.entries);
    const int tiles = (count + kTile - 1) / kTile;
    for (int t = 0; t < 3; ++t) load_entries(entries, count, t);
    cp_async_commit();
    start(segment);
    cp_async_wait<0>();
    sync_block();
    load_tile(0);
    cp_async_commit();
    for (int t = 0; t < tiles; ++t) {
      if (t + 1 < tiles) {
        load_tile(t + 1);
        load_entries(entries, count, t + 3);  // two waits ahead of its use by load_tile
        cp_async_commit();
        cp_async_wait<1>();
      } else {
        cp_async_wait<0>();
      }
      sync_block();
      attend(t);
      sync_block();
    }
    return finish(index);
  }

 private:
  static DENDRITE_DEVICE int lane() { return threadIdx.x % 32; }
  static DENDRITE_DEVICE int warp() { return threadIdx.x / 32; }
  static DENDRITE_DEVICE int head() { return blockIdx.y; }

  DENDRITE_DEVICE WorkEntry* ring(int t) const {
    return reinterpret_cast<WorkEntry*>(smem_ + Shared::kEntriesAt) + (t & 3) * kTile;
  }
  DENDRITE_DEVICE T* keys(int t) const {
    return reinterpret_cast<T*>(smem_ + (t & 1) * 2 * Shared::kTileBytes);
  }
  DENDRITE_DEVICE T* values(int t) const {
    return reinterpret_cast<T*>(smem_ + ((t & 1) * 2 + 1) * Shared::kTileBytes);
  }

  DENDRITE_DEVICE int32_t* positions() const {
    return reinterpret_cast<int32_t*>(smem_ + Shared::kPositionsAt);
  }

  // Query of this lane in row half `half` of an m16 tile.
  DENDRITE_DEVICE int query(int mt, int half) const {
    return (warp() * kMTiles + mt) * 16 + half * 8 + lane() / 4;
  }

  DENDRITE_DEVICE void start(const WorkSegment& segment) {
    num_queries_ = segment.num_rows * p_.group;
    low_position_ = 0x7fffffff;
    high_position_ = -1;
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = query(mt, half);
        const bool valid = i < num_queries_;
        const int position = valid ? p_.positions[segment.row_begin + i / p_.group] : -1;
        if (lane() % 4 == 0) positions()[i] = position;  // read by this warp alone
        if (valid) {
          low_position_ = min(low_position_, position);
          high_position_ = max(high_position_, position);
        }
        const T* q = static_cast<const T*>(p_.q) +
                     (valid ? query_offset(p_, segment.row_begin, i, head(), kDim) : 0) + lane() % 4 * 2;
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          q_[mt][k][half] = valid ? *reinterpret_cast<const uint32_t*>(q + k * 16) : 0u;
          q_[mt][k][half + 2] = valid ? *reinterpret_cast<const uint32_t*>(q + k * 16 + 8) : 0u;
        }
      }
    }
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) {
      low_position_ = min(low_position_, shfl_xor(low_position_, mask));
      high_position_ = max(high_position_, shfl_xor(high_position_, mask));
    }
    clear();
  }

  DENDRITE_DEVICE void clear() {
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
      m_[mt][0] = m_[mt][1] = kMinusInf;
      l_[mt][0] = l_[mt][1] = 0.f;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n)
        o_[mt][n][0] = o_[mt][n][1] = o_[mt][n][2] = o_[mt][n][3] = 0.f;
    }
  }

  DENDRITE_DEVICE void load_entries(const WorkEntry* entries, int count, int t) {
    const int j = threadIdx.x;
    if (j >= kTile) return;
    const int index = t * kTile + j;
    const bool valid = index < count;
    cp_async_16(ring(t) + j, entries + (valid ? index : 0), valid ? 16 : 0);
  }

  // A whole entry is one contiguous piece of memory.
  DENDRITE_DEVICE void load_tile(int t) {
    constexpr int kParts = kDim / 8;  // 16-byte parts of a row
    const WorkEntry* entries = ring(t);
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      const WorkEntry entry = entries[j];
      const int page = entry.slot >> p_.page_shift;
      const int offset = entry.slot - (page << p_.page_shift);
      const size_t from =
          (((size_t(page) * p_.kv_heads + head()) << p_.page_shift) + offset) * kDim;
      const T* k_from = static_cast<const T*>(p_.k_pages) + from;
      const T* v_from = static_cast<const T*>(p_.v_pages) + from;
#pragma unroll
      for (int first = 0; first < kUnit * kParts; first += kAttentionThreads) {
        const int part = first + threadIdx.x;
        if (kUnit * kParts % kAttentionThreads != 0 && part >= kUnit * kParts) break;
        const int row = part / kParts;
        const int to = (j * kUnit + row) * Shared::kStride + part % kParts * 8;
        const bool valid = row < entry.len;
        cp_async_16(keys(t) + to, k_from + (valid ? part * 8 : 0), valid ? 16 : 0);
        cp_async_16(values(t) + to, v_from + (valid ? part * 8 : 0), valid ? 16 : 0);
      }
    }
  }

  // Whether the queries [low, high) read the entry, and whether all of them see all of it.
  DENDRITE_DEVICE bool reads(const WorkEntry& entry, int low, int high) const {
    return entry.len > 0 && int(entry.rows & 0xffff) * p_.group < high &&
           int(entry.rows >> 16) * p_.group > low;
  }
  DENDRITE_DEVICE bool all_see(const WorkEntry& entry, int low, int high) const {
    return int(entry.rows & 0xffff) * p_.group <= low && int(entry.rows >> 16) * p_.group >= high &&
           entry.len == kUnit && entry.pos + kUnit - 1 <= low_position_ &&
           (p_.window == 0 || entry.pos > high_position_ - p_.window);
  }

  // Entries go through the tensor cores in groups, which keeps enough instructions in flight; one
  // by one where a maximum grows or where some of them are not for this warp. Both ways do the same
  // arithmetic in the same order.
  DENDRITE_DEVICE void attend(int t) {
    const int low = warp() * kMTiles * 16;
    const int high = min(low + kMTiles * 16, num_queries_);
#pragma unroll 1
    for (int first = 0; first < kTile; first += kGroup) {
      const WorkEntry* entries = ring(t) + first;
      bool some = false, all = true, whole = true;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const bool read = reads(entries[j], low, high);
        some |= read;
        all &= read;
        whole &= all_see(entries[j], low, high);
      }
      if (!some) continue;
      const T* k = keys(t) + first * kUnit * Shared::kStride;
      const T* v = values(t) + first * kUnit * Shared::kStride;
      if (all && group_without_growth(entries, k, v, whole)) continue;
#pragma unroll 1
      for (int j = 0; j < kGroup; ++j) {
        if (!reads(entries[j], low, high)) continue;
        one_entry(entries + j, k + j * kUnit * Shared::kStride, v + j * kUnit * Shared::kStride);
      }
    }
  }

  // False, and nothing done, when some row's maximum has to grow.
  DENDRITE_DEVICE bool group_without_growth(const WorkEntry* entries, const T* k, const T* v,
                                            bool whole) {
    float s[kMTiles][2 * kGroup][4];
    scores<kGroup>(k, s);
    if (!whole) mask<kGroup>(entries, s);
    bool grows = false;
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        grows |= has_to_grow(m_[mt][half], top<kGroup>(s[mt], half));
    if (any_sync(grows)) return false;
    weigh<kGroup>(s);
    accumulate<kGroup>(v, s);
    return true;
  }

  DENDRITE_DEVICE void one_entry(const WorkEntry* entry, const T* k, const T* v) {
    float s[kMTiles][2][4];
    scores<1>(k, s);
    mask<1>(entry, s);
    grow(s);
    weigh<1>(s);
    accumulate<1>(v, s);
  }

  // Raw scores of kCount entries.
  template <int kCount>
  DENDRITE_DEVICE void scores(const T* k, float (&s)[kMTiles][2 * kCount][4]) const {
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt)
#pragma unroll
      for (int n = 0; n < 2 * kCount; ++n) s[mt][n][0] = s[mt][n][1] = s[mt][n][2] = s[mt][n][3] = 0.f;
    // Matrices of ldmatrix: slots 0-7 and 8-15, each with dims 0-7 and 8-15 of the step.
    const T* at = k + (lane() / 16 * 8 + lane() % 8) * Shared::kStride + lane() / 8 % 2 * 8;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        uint32_t b[4];
        ldmatrix_x4(b, at + j * kUnit * Shared::kStride + step * 16);
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
        for (int mt = 0; mt < kMTiles; ++mt) {
          mma_m16n8k16<T>(s[mt][2 * j], q_[mt][step], low);
          mma_m16n8k16<T>(s[mt][2 * j + 1], q_[mt][step], high);
        }
      }
    }
  }

  template <int kCount>
  DENDRITE_DEVICE void mask(const WorkEntry* entries, float (&s)[kMTiles][2 * kCount][4]) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const WorkEntry entry = entries[j];
      const int begin = int(entry.rows & 0xffff) * p_.group;
      const int end = int(entry.rows >> 16) * p_.group;
#pragma unroll
      for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = query(mt, half), reader = positions()[i];
          const bool here = i >= begin && i < end;
          const int stop = here ? min(entry.len, reader - entry.pos + 1) : 0;  // visible slots
          const int from = p_.window > 0 ? reader - p_.window + 1 - entry.pos : 0;
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const int slot = c / 2 * 8 + lane() % 4 * 2 + c % 2;
            float& score = s[mt][2 * j + c / 2][half * 2 + c % 2];
            if (slot >= stop || slot < from) score = kMinusInf;
          }
        }
      }
    }
  }

  // The largest of this lane's raw scores of a row.
  template <int kCount>
  static DENDRITE_DEVICE float top(const float (&s)[2 * kCount][4], int half) {
    float top = kMinusInf;
#pragma unroll
    for (int n = 0; n < 2 * kCount; ++n)
      top = fmaxf(top, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
    return top;
  }

  DENDRITE_DEVICE bool has_to_grow(float m, float top) const {
    return m == kMinusInf ? top > kMinusInf : fmaf(top, p_.scale_log2, -m) > kLazy;
  }

  // Brings the maxima up to one entry's scores.
  DENDRITE_DEVICE void grow(const float (&s)[kMTiles][2][4]) {
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = top<1>(s[mt], half);
        largest = fmaxf(largest, shfl_xor(largest, 1));
        largest = fmaxf(largest, shfl_xor(largest, 2));
        const bool grows = has_to_grow(m_[mt][half], largest);
        if (!any_sync(grows)) continue;
        const float m = grows ? largest * p_.scale_log2 : m_[mt][half];
        const float factor = grows ? exp2_fast(m_[mt][half] - m) : 1.f;
        m_[mt][half] = m;
        l_[mt][half] *= factor;
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          o_[mt][n][half * 2] *= factor;
          o_[mt][n][half * 2 + 1] *= factor;
        }
      }
    }
  }

  // Turns raw scores into weights exp2(score - m) and adds them to l.
  template <int kCount>
  DENDRITE_DEVICE void weigh(float (&s)[kMTiles][2 * kCount][4]) {
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float minus_m = m_[mt][half] == kMinusInf ? 0.f : -m_[mt][half];
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          float w[4];
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            float& score = s[mt][2 * j + c / 2][half * 2 + c % 2];
            w[c] = score = exp2_fast(fmaf(score, p_.scale_log2, minus_m));
          }
          l_[mt][half] += (w[0] + w[1]) + (w[2] + w[3]);
        }
      }
    }
  }

  template <int kCount>
  DENDRITE_DEVICE void accumulate(const T* v, const float (&s)[kMTiles][2 * kCount][4]) {
    // Matrices of ldmatrix: slots 0-7 and 8-15 of dims 0-7, then of dims 8-15.
    const T* at = v + (lane() / 8 % 2 * 8 + lane() % 8) * Shared::kStride + lane() / 16 * 8;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      uint32_t a[kMTiles][4];
#pragma unroll
      for (int mt = 0; mt < kMTiles; ++mt) {
        a[mt][0] = pack2<T>(s[mt][2 * j][0], s[mt][2 * j][1]);
        a[mt][1] = pack2<T>(s[mt][2 * j][2], s[mt][2 * j][3]);
        a[mt][2] = pack2<T>(s[mt][2 * j + 1][0], s[mt][2 * j + 1][1]);
        a[mt][3] = pack2<T>(s[mt][2 * j + 1][2], s[mt][2 * j + 1][3]);
      }
#pragma unroll
      for (int n = 0; n < kSteps; ++n) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, at + j * kUnit * Shared::kStride + n * 16);
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
        for (int mt = 0; mt < kMTiles; ++mt) {
          mma_m16n8k16<T>(o_[mt][2 * n], a[mt], low);
          mma_m16n8k16<T>(o_[mt][2 * n + 1], a[mt], high);
        }
      }
    }
  }

  // The four lanes of a row hold parts of l.
  DENDRITE_DEVICE void gather_l() {
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        l_[mt][half] += shfl_xor(l_[mt][half], 1);
        l_[mt][half] += shfl_xor(l_[mt][half], 2);
      }
    }
  }

  // Reads the segment again: it is not worth registers in the main loop.
  DENDRITE_DEVICE int finish(int index) {
    const WorkSegment segment = read_segment(p_, index);
    gather_l();
    if (segment.slot < 0)
      write_out(segment.row_begin);
    else
      write_partial(segment.slot);
    return segment.next;
  }

  DENDRITE_DEVICE void write_out(int row_begin) const {
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = query(mt, half);
        if (i >= num_queries_) continue;
        T* out = static_cast<T*>(p_.out) + query_offset(p_, row_begin, i, head(), kDim) + lane() % 4 * 2;
        const float l = l_[mt][half];
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n)
          *reinterpret_cast<uint32_t*>(out + n * 8) = pack2<T>(
              normalised(o_[mt][n][half * 2], l), normalised(o_[mt][n][half * 2 + 1], l));
      }
    }
  }

  DENDRITE_DEVICE void write_partial(int slot) const {
    const PartialView<kQTile, kDim> partial(p_, slot, head());
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = query(mt, half);
        if (i >= num_queries_) continue;
        if (lane() % 4 == 0) {
          partial.ml[2 * i] = m_[mt][half];
          partial.ml[2 * i + 1] = l_[mt][half];
        }
        if (m_[mt][half] == kMinusInf) continue;
        float* o = partial.o + size_t(i) * kDim + lane() % 4 * 2;
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n)
          *reinterpret_cast<float2*>(o + n * 8) =
              make_float2(o_[mt][n][half * 2], o_[mt][n][half * 2 + 1]);
      }
    }
  }

  const TreeAttentionParams& p_;
  char* smem_;
  int num_queries_, low_position_, high_position_;
  uint32_t q_[kMTiles][kSteps][4];
  float m_[kMTiles][2], l_[kMTiles][2];
  float o_[kMTiles][kDim / 8][4];
};

#ifndef DENDRITE_OCC
#define DENDRITE_OCC 3
#endif
// Blocks that a multiprocessor should hold: bounds the registers of a thread.
constexpr int attention_blocks(int dim, int m_tiles) {
  return dim <= 128 && m_tiles == 1 ? DENDRITE_OCC : 2;
}

template <class T, int kDim, int kMTiles, int kTile>
DENDRITE_KERNEL __launch_bounds__(kAttentionThreads, attention_blocks(kDim, kMTiles))
tree_attention_kernel(TreeAttentionParams p) {
  DENDRITE_SHARED_MEMORY(char, smem);
  grid_dependency_wait();
  grid_dependency_launch();
  AttentionWarp<T, kDim, kMTiles, kTile> warp(p, smem);
  for (int index = blockIdx.x; index >= 0;) index = warp.run(index);
}

}  // namespace dendrite
