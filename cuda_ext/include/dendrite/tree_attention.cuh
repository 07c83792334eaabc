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
  static constexpr int kFlagAt = kPositionsAt + 128 * int(sizeof(int32_t));
  static constexpr int kBytes = kFlagAt + 16;
};

template <class T, int kDim, int kMTiles, int kTile>
class AttentionWarp {
  using Shared = AttentionShared<kDim, kTile>;
  static constexpr int kQTile = 64 * kMTiles;
  static constexpr int kSteps = kDim / 16;

 public:
  DENDRITE_DEVICE AttentionWarp(const TreeAttentionParams& p, char* smem)
      : p_(p), smem_(smem) {}

  DENDRITE_DEVICE void run(int index) {
    const WorkSegment segment = read_segment(p_.work, index);
    start(read_block(p_.work, segment.block));
    const auto* entries = reinterpret_cast<const WorkEntry*>(p_.work + p_.work[kEntries]);
    const int count = segment.entry_end - segment.entry_begin;
    const int tiles = (count + kTile - 1) / kTile;
    entries += segment.entry_begin;
    for (int t = 0; t < 3; ++t) load_entries(entries, count, t);
    cp_async_commit();
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
    finish(index);
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

  DENDRITE_DEVICE void start(const WorkBlock& block) {
    num_queries_ = block.num_rows * p_.group;
    low_position_ = 0x7fffffff;
    high_position_ = -1;
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = query(mt, half);
        const bool valid = i < num_queries_;
        const int position = valid ? p_.positions[block.row_begin + i / p_.group] : -1;
        if (lane() % 4 == 0) positions()[i] = position;  // read by this warp alone
        if (valid) {
          low_position_ = min(low_position_, position);
          high_position_ = max(high_position_, position);
        }
        const T* q = static_cast<const T*>(p_.q) +
                     (valid ? query_offset(p_, block, i, head(), kDim) : 0) + lane() % 4 * 2;
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

  DENDRITE_DEVICE void load_tile(int t) {
    constexpr int kParts = kDim / 8;  // 16-byte parts of a row
    const WorkEntry* entries = ring(t);
    T *keys_to = keys(t), *values_to = values(t);
    const T* k_from = static_cast<const T*>(p_.k_pages);
    const T* v_from = static_cast<const T*>(p_.v_pages);
#pragma unroll 4
    for (int first = 0; first < kTile * kUnit * kParts; first += kAttentionThreads) {
      const int index = first + threadIdx.x;
      if (kTile * kUnit * kParts % kAttentionThreads != 0 && index >= kTile * kUnit * kParts) break;
      const int row = index / kParts, part = index % kParts;
      const WorkEntry entry = entries[row / kUnit];
      const int r = row % kUnit;
      const int bytes = r < entry.len ? 16 : 0;
      const int page = entry.slot >> p_.page_shift;
      const int offset = entry.slot - (page << p_.page_shift) + (bytes ? r : 0);
      const size_t from =
          (((size_t(page) * p_.kv_heads + head()) << p_.page_shift) + offset) * kDim + part * 8;
      cp_async_16(keys_to + row * Shared::kStride + part * 8, k_from + from, bytes);
      cp_async_16(values_to + row * Shared::kStride + part * 8, v_from + from, bytes);
    }
  }

  DENDRITE_DEVICE void attend(int t) {
    const WorkEntry* entries = ring(t);
    const int low = warp() * kMTiles * 16;
    const int high = min(low + kMTiles * 16, num_queries_);
#pragma unroll 1
    for (int j = 0; j < kTile; ++j) {
      const WorkEntry entry = entries[j];
      const int begin = int(entry.rows & 0xffff) * p_.group;
      const int end = int(entry.rows >> 16) * p_.group;
      if (entry.len == 0 || begin >= high || end <= low) continue;
      float s[kMTiles][2][4];
      scores(keys(t) + j * kUnit * Shared::kStride, s);
      const bool all_see = begin <= low && end >= high && entry.len == kUnit &&
                           entry.pos + kUnit - 1 <= low_position_ &&
                           (p_.window == 0 || entry.pos > high_position_ - p_.window);
      if (!all_see) mask(s, entry, begin, end);
      weigh(s);
      accumulate(values(t) + j * kUnit * Shared::kStride, s);
    }
  }

  DENDRITE_DEVICE void scores(const T* k, float (&s)[kMTiles][2][4]) const {
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt)
#pragma unroll
      for (int c = 0; c < 8; ++c) s[mt][c / 4][c % 4] = 0.f;
    // Matrices of ldmatrix: slots 0-7 and 8-15, each with dims 0-7 and 8-15 of the step.
    const T* at = k + (lane() / 16 * 8 + lane() % 8) * Shared::kStride + lane() / 8 % 2 * 8;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t b[4];
      ldmatrix_x4(b, at + step * 16);
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
      for (int mt = 0; mt < kMTiles; ++mt) {
        mma_m16n8k16<T>(s[mt][0], q_[mt][step], low);
        mma_m16n8k16<T>(s[mt][1], q_[mt][step], high);
      }
    }
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt)
#pragma unroll
      for (int c = 0; c < 8; ++c) s[mt][c / 4][c % 4] *= p_.scale_log2;
  }

  DENDRITE_DEVICE void mask(float (&s)[kMTiles][2][4], const WorkEntry& entry, int begin,
                            int end) const {
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const int half = c % 4 / 2;
        const int slot = c / 4 * 8 + lane() % 4 * 2 + c % 2;
        const int i = query(mt, half), at = entry.pos + slot, reader = positions()[i];
        const bool sees = i >= begin && i < end && slot < entry.len && at <= reader &&
                          (p_.window == 0 || at > reader - p_.window);
        if (!sees) s[mt][c / 4][c % 4] = kMinusInf;
      }
    }
  }

  // Turns scores into weights exp2(s - m) and updates m, l and the scale of o.
  DENDRITE_DEVICE void weigh(float (&s)[kMTiles][2][4]) {
    float factor[kMTiles][2];
    bool rescale = false;
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int c = half * 2;
        float top = fmaxf(fmaxf(s[mt][0][c], s[mt][0][c + 1]), fmaxf(s[mt][1][c], s[mt][1][c + 1]));
        top = fmaxf(top, shfl_xor(top, 1));
        top = fmaxf(top, shfl_xor(top, 2));
        const float old = m_[mt][half];
        const bool grew = top > old + kLazy || (old == kMinusInf && top > kMinusInf);
        factor[mt][half] = grew ? exp2_fast(old - top) : 1.f;
        if (grew) m_[mt][half] = top;
        rescale |= grew;
      }
    }
    if (any_sync(rescale)) {
#pragma unroll
      for (int mt = 0; mt < kMTiles; ++mt) {
        l_[mt][0] *= factor[mt][0];
        l_[mt][1] *= factor[mt][1];
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          o_[mt][n][0] *= factor[mt][0];
          o_[mt][n][1] *= factor[mt][0];
          o_[mt][n][2] *= factor[mt][1];
          o_[mt][n][3] *= factor[mt][1];
        }
      }
    }
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float m = m_[mt][half] == kMinusInf ? 0.f : m_[mt][half];
        const int c = half * 2;
        s[mt][0][c] = exp2_fast(s[mt][0][c] - m);
        s[mt][0][c + 1] = exp2_fast(s[mt][0][c + 1] - m);
        s[mt][1][c] = exp2_fast(s[mt][1][c] - m);
        s[mt][1][c + 1] = exp2_fast(s[mt][1][c + 1] - m);
        l_[mt][half] += (s[mt][0][c] + s[mt][0][c + 1]) + (s[mt][1][c] + s[mt][1][c + 1]);
      }
    }
  }

  DENDRITE_DEVICE void accumulate(const T* v, const float (&s)[kMTiles][2][4]) {
    uint32_t a[kMTiles][4];
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
      a[mt][0] = pack2<T>(s[mt][0][0], s[mt][0][1]);
      a[mt][1] = pack2<T>(s[mt][0][2], s[mt][0][3]);
      a[mt][2] = pack2<T>(s[mt][1][0], s[mt][1][1]);
      a[mt][3] = pack2<T>(s[mt][1][2], s[mt][1][3]);
    }
    // Matrices of ldmatrix: slots 0-7 and 8-15 of dims 0-7, then of dims 8-15.
    const T* at = v + (lane() / 8 % 2 * 8 + lane() % 8) * Shared::kStride + lane() / 16 * 8;
#pragma unroll
    for (int n = 0; n < kSteps; ++n) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, at + n * 16);
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
      for (int mt = 0; mt < kMTiles; ++mt) {
        mma_m16n8k16<T>(o_[mt][2 * n], a[mt], low);
        mma_m16n8k16<T>(o_[mt][2 * n + 1], a[mt], high);
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

  // Reads segment and block again: they are not worth registers in the main loop.
  DENDRITE_DEVICE void finish(int index) {
    const WorkSegment segment = read_segment(p_.work, index);
    const WorkBlock block = read_block(p_.work, segment.block);
    gather_l();
    if (segment.slot < 0) {
      write_out(block);
      return;
    }
    write_partial(segment.slot);
    int* flag = reinterpret_cast<int*>(smem_ + Shared::kFlagAt);
    if (last_to_arrive(p_, segment, block, head(), flag))
      merge_partials<T, kQTile, kDim>(p_, block, head());
    sync_block();
  }

  DENDRITE_DEVICE void write_out(const WorkBlock& block) const {
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = query(mt, half);
        if (i >= num_queries_) continue;
        T* out = static_cast<T*>(p_.out) + query_offset(p_, block, i, head(), kDim) + lane() % 4 * 2;
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

// Blocks that a multiprocessor should hold: bounds the registers of a thread.
constexpr int attention_blocks(int dim, int m_tiles) {
  return dim <= 64 && m_tiles == 1 ? 4 : dim <= 128 && m_tiles == 1 ? 3 : 2;
}

template <class T, int kDim, int kMTiles, int kTile>
DENDRITE_KERNEL __launch_bounds__(kAttentionThreads, attention_blocks(kDim, kMTiles))
tree_attention_kernel(TreeAttentionParams p) {
  DENDRITE_SHARED_MEMORY(char, smem);
  grid_dependency_wait();
  grid_dependency_launch();
  const int worker = blockIdx.x;
  if (worker >= p.work[kNumWorkers]) return;
  const int* indptr = p.work + p.work[kSegmentIndptr];
  AttentionWarp<T, kDim, kMTiles, kTile> warp(p, smem);
  for (int s = indptr[worker]; s < indptr[worker + 1]; ++s) warp.run(s);
}

}  // namespace dendrite
