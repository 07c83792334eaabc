// Tree attention on tensor cores (mma.sync m16n8k16, bf16 or fp16 with fp32 accumulation).
//
// A block of threads takes segments of the work list one after another. A segment is a tile of up
// to 16 * kWarps queries (consecutive rows times the query heads of one kv head) and a run of
// entries (16 slots of one page each) that some of those rows read. K and V of kTile entries are
// loaded together by cp.async, two tiles deep, and used by all queries of the tile: a page is read
// once per tile, whatever the tree. Each warp owns 16 queries and skips entries that none of them
// reads. Softmax is updated entry by entry, a maximum only where weights got too large, so a row's
// sequence of operations is that of its own entries (see attention_work.h).
#pragma once

#include "tree_attention_rows.cuh"

namespace dendrite {

template <int kDim, int kTile>
struct AttentionShared {
  static constexpr int kStride = kDim + 8;  // elements; the pad keeps ldmatrix free of conflicts
  static constexpr int kTileBytes = kTile * kUnit * kStride * 2;
  static constexpr int kEntriesAt = 4 * kTileBytes;  // K and V, two stages
  static constexpr int kBytes = kEntriesAt + 4 * kTile * int(sizeof(WorkEntry));
};

// Brings unquantised pages to shared memory, row j * kUnit + r of a tile for slot r of entry j.
template <class T, int kDim, int kThreads, int kTile>
struct PageReader {
  using Params = TreeAttentionParams;
  static constexpr bool kScaled = false;
  static constexpr int kSharedBytes = 0;
  static constexpr int kStride = AttentionShared<kDim, kTile>::kStride;

  const Params& p;

  DENDRITE_DEVICE PageReader(const Params& p, char*) : p(p) {}

  // A whole entry is one contiguous piece of memory.
  DENDRITE_DEVICE void load_tile(const WorkEntry* entries, int head, T* keys, T* values, int) const {
    constexpr int kParts = kDim / 8;  // 16-byte parts of a row
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      const WorkEntry entry = entries[j];
      const size_t from = entry_offset(p, entry, head, kDim);
      const T* k_from = static_cast<const T*>(p.k_pages) + from;
      const T* v_from = static_cast<const T*>(p.v_pages) + from;
#pragma unroll
      for (int first = 0; first < kUnit * kParts; first += kThreads) {
        const int part = first + threadIdx.x;
        if (kUnit * kParts % kThreads != 0 && part >= kUnit * kParts) break;
        const int row = part / kParts;
        const int to = (j * kUnit + row) * kStride + part % kParts * 8;
        const bool valid = row < entry.len;
        cp_async_16(keys + to, k_from + (valid ? part * 8 : 0), valid ? 16 : 0);
        cp_async_16(values + to, v_from + (valid ? part * 8 : 0), valid ? 16 : 0);
      }
    }
  }
};

template <class T, int kDim, int kWarps, int kTile, class Reader>
class AttentionWarp {
  using Shared = AttentionShared<kDim, kTile>;
  static constexpr int kSteps = kDim / 16;
  static constexpr int kThreads = kWarps * 32;

 public:
  DENDRITE_DEVICE AttentionWarp(const typename Reader::Params& p, char* smem)
      : p_(p), smem_(smem), reader_(p, smem + Shared::kBytes) {}

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
    // Read again: it is not worth registers in the main loop.
    const WorkSegment done = read_segment(p_, index);
    rows_.template finish<16 * kWarps>(p_, done, head());
    return done.next;
  }

 private:
  static DENDRITE_DEVICE int lane() { return threadIdx.x % 32; }
  static DENDRITE_DEVICE int head() { return blockIdx.y; }
  static DENDRITE_DEVICE int first_query() { return threadIdx.x / 32 * 16; }

  DENDRITE_DEVICE WorkEntry* ring(int t) const {
    return reinterpret_cast<WorkEntry*>(smem_ + Shared::kEntriesAt) + (t & 3) * kTile;
  }
  DENDRITE_DEVICE T* keys(int t) const {
    return reinterpret_cast<T*>(smem_ + (t & 1) * 2 * Shared::kTileBytes);
  }
  DENDRITE_DEVICE T* values(int t) const {
    return reinterpret_cast<T*>(smem_ + ((t & 1) * 2 + 1) * Shared::kTileBytes);
  }

  DENDRITE_DEVICE void start(const WorkSegment& segment) {
    rows_.start(p_, segment, first_query());
    rows_.load_queries(p_, segment.row_begin, head(), q_);
  }

  DENDRITE_DEVICE void load_entries(const WorkEntry* entries, int count, int t) {
    const int j = threadIdx.x;
    if (j >= kTile) return;
    const int index = t * kTile + j;
    const bool valid = index < count;
    cp_async_16(ring(t) + j, entries + (valid ? index : 0), valid ? 16 : 0);
  }

  DENDRITE_DEVICE void load_tile(int t) {
    reader_.load_tile(ring(t), head(), keys(t), values(t), t & 1);
  }

  // The entries of a tile go through the tensor cores together, which keeps enough instructions in
  // flight; one by one where a maximum grows or where some of them are not for this warp. Both ways
  // do the same arithmetic in the same order.
  DENDRITE_DEVICE void attend(int t) {
    const int low = first_query(), high = low + 16;
    const WorkEntry* entries = ring(t);
    bool some = false, all = true, whole = true;
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      const bool read = rows_.reads(p_, entries[j], low, high);
      some |= read;
      all &= read;
      whole &= rows_.all_see(p_, entries[j]);
    }
    if (!some) return;
    if constexpr (kDim <= 128) {  // beyond, registers hold the scores of one entry only
      if (all && tile_without_growth(t, whole)) return;
    }
#pragma unroll 1
    for (int j = 0; j < kTile; ++j) {
      if (!rows_.reads(p_, entries[j], low, high)) continue;
      one_entry(entries + j, t, j);
    }
  }

  // False, and nothing done, when some row's maximum has to grow.
  DENDRITE_DEVICE bool tile_without_growth(int t, bool whole) {
    float s[1][2 * kTile][4];
    scores<kTile>(keys(t), s);
    if constexpr (Reader::kScaled) reader_.template scale_scores<kTile>(s[0], t & 1, 0);
    if (!whole) rows_.template mask<kTile>(p_, ring(t), s);
    float sums[1][2] = {{rows_.l[0][0], rows_.l[0][1]}};
    if (any_sync(rows_.template weigh<kTile>(p_.scale_log2, s, 0, kTile, sums))) return false;
    rows_.l[0][0] = sums[0][0];
    rows_.l[0][1] = sums[0][1];
    if constexpr (Reader::kScaled) reader_.template scale_weights<kTile>(s[0], t & 1, 0);
    accumulate<kTile>(values(t), s);
    return true;
  }

  DENDRITE_DEVICE void one_entry(const WorkEntry* entry, int t, int j) {
    const int at = j * kUnit * Shared::kStride;
    float s[1][2][4];
    scores<1>(keys(t) + at, s);
    if constexpr (Reader::kScaled) reader_.template scale_scores<1>(s[0], t & 1, j);
    rows_.template mask<1>(p_, entry, s);
    rows_.template grow<1>(p_.scale_log2, s, 0);
    rows_.template weigh<1>(p_.scale_log2, s, 0, 1, rows_.l);
    if constexpr (Reader::kScaled) reader_.template scale_weights<1>(s[0], t & 1, j);
    accumulate<1>(values(t) + at, s);
  }

  // Raw scores of kCount entries.
  template <int kCount>
  DENDRITE_DEVICE void scores(const T* k, float (&s)[1][2 * kCount][4]) const {
#pragma unroll
    for (int n = 0; n < 2 * kCount; ++n) s[0][n][0] = s[0][n][1] = s[0][n][2] = s[0][n][3] = 0.f;
    // Matrices of ldmatrix: slots 0-7 and 8-15, each with dims 0-7 and 8-15 of the step.
    const T* at = k + (lane() / 16 * 8 + lane() % 8) * Shared::kStride + lane() / 8 % 2 * 8;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        uint32_t b[4];
        ldmatrix_x4(b, at + j * kUnit * Shared::kStride + step * 16);
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
        mma_m16n8k16<T>(s[0][2 * j], q_[step], low);
        mma_m16n8k16<T>(s[0][2 * j + 1], q_[step], high);
      }
    }
  }

  template <int kCount>
  DENDRITE_DEVICE void accumulate(const T* v, const float (&s)[1][2 * kCount][4]) {
    // Matrices of ldmatrix: slots 0-7 and 8-15 of dims 0-7, then of dims 8-15.
    const T* at = v + (lane() / 8 % 2 * 8 + lane() % 8) * Shared::kStride + lane() / 16 * 8;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      uint32_t a[4];
      rows_.template pack<kCount>(s[0], j, a);
#pragma unroll
      for (int n = 0; n < kSteps; ++n) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, at + j * kUnit * Shared::kStride + n * 16);
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
        mma_m16n8k16<T>(rows_.o[0][2 * n], a, low);
        mma_m16n8k16<T>(rows_.o[0][2 * n + 1], a, high);
      }
    }
  }

  const TreeAttentionParams& p_;
  char* smem_;
  const Reader reader_;
  uint32_t q_[kSteps][4];
  AttentionRows<T, kDim, 1> rows_;
};

// `Reader`: PageReader, or PackedReader.
template <class T, int kDim, int kWarps, int kTile, template <class, int, int, int> class Reader>
DENDRITE_KERNEL __launch_bounds__(kWarps * 32, 1)
tree_attention_kernel(typename Reader<T, kDim, kWarps * 32, kTile>::Params p) {
  DENDRITE_SHARED_MEMORY(char, smem);
  grid_dependency_launch();
  grid_dependency_wait();
  AttentionWarp<T, kDim, kWarps, kTile, Reader<T, kDim, kWarps * 32, kTile>> warp(p, smem);
  for (int index = blockIdx.x; index >= 0;) index = warp.run(index);
}

}  // namespace dendrite
