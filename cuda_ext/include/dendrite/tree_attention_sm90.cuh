// Tree attention on Hopper: warpgroup products read K and V from shared memory, so that registers
// and shared-memory bandwidth are left for what else there is to do.
//
// Work, masking, softmax and the order of a row's operations are those of tree_attention.cuh; the
// products of an entry are the same k16 steps. A warpgroup owns 64 queries; kGroups of them share
// the tiles of K and V, kStages deep. While a tile's softmax runs, the scores of the next tile are
// being computed.
#pragma once

#include "tree_attention_rows.cuh"
#include "wgmma.cuh"

namespace dendrite {

template <int kDim, int kGroups>
struct AttentionSharedSm90 {
  static constexpr int kTile = kTileUnits;
  static constexpr int kStages = kDim == 128 && kGroups == 1 ? 3 : 4;
  static constexpr int kRing = 8;  // tiles of entries
  static constexpr int kPanels = kDim / 64;
  static constexpr int kTileBytes = kPanels * kPanelBytes;  // of K, and of V
  static constexpr int kQueriesAt = 2 * kStages * kTileBytes;
  static constexpr int kEntriesAt = kQueriesAt + kGroups * kTileBytes;
  static constexpr int kPositionsAt = kEntriesAt + kRing * kTile * int(sizeof(WorkEntry));
  static constexpr int kBytes = kPositionsAt + kGroups * 64 * 4 + 1024;  // room to align
};

template <class T, int kDim, int kGroups>
class AttentionWarpgroups {
  using Shared = AttentionSharedSm90<kDim, kGroups>;
  using Scores = float[1][2 * kTileUnits][4];
  static constexpr int kThreads = 128 * kGroups;
  static constexpr int kTile = kTileUnits;
  static constexpr int kStages = Shared::kStages;

 public:
  DENDRITE_DEVICE AttentionWarpgroups(const TreeAttentionParams& p, char* smem)
      : p_(p), smem_(smem) {}

  // Takes one segment; returns the worker's next one, or -1.
  DENDRITE_DEVICE int run(int index) {
    const WorkSegment segment = read_segment(p_, index);
    count_ = segment.count;
    if (count_ == 0) return -1;
    entries_ = reinterpret_cast<const WorkEntry*>(p_.work + segment.entries);
    const int tiles = (count_ + kTile - 1) / kTile;
    for (int t = 0; t < 2 * kStages - 2; ++t) load_entries(t);
    cp_async_commit();
    rows_.start(p_, segment, threadIdx.x / 32 * 16,
                reinterpret_cast<int32_t*>(smem_ + Shared::kPositionsAt));
    load_queries(segment);
    cp_async_wait<0>();
    sync_block();
    for (int t = 0; t < kStages - 1; ++t) {
      if (t < tiles) load_tile(t);
      cp_async_commit();
    }
    cp_async_wait<kStages - 2>();
    fence_shared_for_wgmma();
    sync_block();
    Scores a, b;
    start_scores(0, a);
    wgmma_wait<0>();
    hold(a[0]);
    for (int t = 0; t < tiles; t += 2) {
      step(t, tiles, a, b);
      if (t + 1 < tiles) step(t + 1, tiles, b, a);
    }
    const WorkSegment done = read_segment(p_, index);
    rows_.template finish<64 * kGroups>(p_, done, head());
    sync_block();  // the next segment overwrites what the slower warps may still read
    return done.next;
  }

 private:
  static DENDRITE_DEVICE int head() { return blockIdx.y; }
  static DENDRITE_DEVICE int group() { return kGroups == 1 ? 0 : threadIdx.x / 128; }

  DENDRITE_DEVICE WorkEntry* ring(int t) const {
    return reinterpret_cast<WorkEntry*>(smem_ + Shared::kEntriesAt) + t % Shared::kRing * kTile;
  }
  DENDRITE_DEVICE char* keys(int t) const {
    return smem_ + t % kStages * 2 * Shared::kTileBytes;
  }
  DENDRITE_DEVICE char* values(int t) const { return keys(t) + Shared::kTileBytes; }

  DENDRITE_DEVICE void load_entries(int t) {
    const int j = threadIdx.x;
    if (j >= kTile) return;
    const int index = t * kTile + j;
    const bool valid = index < count_;
    cp_async_16(ring(t) + j, entries_ + (valid ? index : 0), valid ? 16 : 0);
  }

  DENDRITE_DEVICE void load_queries(const WorkSegment& segment) {
    constexpr int kParts = kDim / 8;
    char* to = smem_ + Shared::kQueriesAt;
#pragma unroll 4
    for (int at = threadIdx.x; at < 64 * kGroups * kParts; at += kThreads) {
      const int i = at / kParts, part = at % kParts;
      const bool valid = i < rows_.num_queries();
      const T* from = static_cast<const T*>(p_.q) + part * 8 +
                      (valid ? query_offset(p_, segment.row_begin, i, head(), kDim) : 0);
      cp_async_16(to + (i / 64 * Shared::kPanels + part / 8) * kPanelBytes +
                      panel_offset(i % 64, part % 8),
                  from, valid ? 16 : 0);
    }
  }

  DENDRITE_DEVICE void load_tile(int t) {
    constexpr int kParts = kDim / 8, kOfEntry = kUnit * kParts;
    const WorkEntry* entries = ring(t);
    char *k_to = keys(t), *v_to = values(t);
#pragma unroll
    for (int first = 0; first < kTile * kOfEntry; first += kThreads) {
      const int at = first + threadIdx.x, part = at % kOfEntry, row = at / kParts;
      const WorkEntry entry = entries[at / kOfEntry];
      const bool valid = row % kUnit < entry.len;
      const size_t from = entry_offset(p_, entry, head(), kDim) + (valid ? part * 8 : 0);
      const int to = part % kParts / 8 * kPanelBytes + panel_offset(row, part % 8);
      cp_async_16(k_to + to, static_cast<const T*>(p_.k_pages) + from, valid ? 16 : 0);
      cp_async_16(v_to + to, static_cast<const T*>(p_.v_pages) + from, valid ? 16 : 0);
    }
  }

  DENDRITE_DEVICE bool reads_tile(int t) const {
    bool some = false;
#pragma unroll
    for (int j = 0; j < kTile; ++j)
      some |= rows_.reads(p_, ring(t)[j], group() * 64, group() * 64 + 64);
    return some;
  }

  // Sends the products of the queries with a tile's keys on their way.
  DENDRITE_DEVICE void start_scores(int t, Scores& s) {
    const char* q = smem_ + Shared::kQueriesAt + group() * Shared::kTileBytes;
    hold(s[0]);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      const int at = k / 4 * kPanelBytes + k % 4 * 32;
      wgmma_keys<T>(s[0], k_major(q + at), k_major(keys(t) + at), k > 0);
    }
    wgmma_commit();
    hold(s[0]);
  }

  // O += weights of entry j times its values.
  DENDRITE_DEVICE void add_values(int t, int j, const uint32_t (&a)[4]) {
    wgmma_values<T, kDim / 8>(rows_.o[0], a, n_major(values(t) + j * kUnit * 128));
  }

  // Softmax and values of tile t, whose raw scores are in s; the scores of the next go to `next`.
  DENDRITE_DEVICE void step(int t, int tiles, Scores& s, Scores& next) {
    cp_async_wait<kStages - 3>();
    fence_shared_for_wgmma();
    sync_block();
    if (t + kStages - 1 < tiles) {
      load_tile(t + kStages - 1);
      load_entries(t + 2 * kStages - 2);
    }
    cp_async_commit();
    const bool reads = reads_tile(t);
    const bool grows = reads && mask_and_check(t, s);
    if (grows) one_by_one(t, s);
    // Behind the last tile the scores are of whatever lies there, and nobody looks at them.
    start_scores(t + 1, next);
    if (reads && !grows) {
      rows_.template weigh<kTile>(p_.scale_log2, s, 0, kTile);
      uint32_t a[kTile][4];
#pragma unroll
      for (int j = 0; j < kTile; ++j) rows_.template pack<kTile>(s[0], j, a[j]);
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < kTile; ++j) add_values(t, j, a[j]);
      wgmma_commit();
    }
    wgmma_wait<0>();
    hold(next[0]);
    hold(rows_.o[0]);
  }

  // Hides what rows may not see; whether a maximum of the warpgroup has to grow.
  DENDRITE_DEVICE bool mask_and_check(int t, Scores& s) const {
    const WorkEntry* entries = ring(t);
    bool whole = true;
#pragma unroll
    for (int j = 0; j < kTile; ++j) whole &= rows_.all_see(p_, entries[j]);
    if (!whole) rows_.template mask<kTile>(p_, entries, s);
    return any_in_warpgroup(rows_.template grows<kTile>(p_.scale_log2, s), 1 + group());
  }

  // A tile whose scores make maxima grow: the values of each entry are added before the next one.
  DENDRITE_DEVICE void one_by_one(int t, Scores& s) {
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      rows_.template grow<kTile>(p_.scale_log2, s, j);
      rows_.template weigh<kTile>(p_.scale_log2, s, j, j + 1);
      uint32_t a[4];
      rows_.template pack<kTile>(s[0], j, a);
      hold(rows_.o[0]);
      wgmma_fence();
      add_values(t, j, a);
      wgmma_commit();
      wgmma_wait<0>();
      hold(rows_.o[0]);
    }
  }

  const TreeAttentionParams& p_;
  char* smem_;
  const WorkEntry* entries_;
  int count_;
  AttentionRows<T, kDim, 1> rows_;
};

template <class T, int kDim, int kGroups>
__global__ void __launch_bounds__(128 * kGroups)
tree_attention_sm90_kernel(TreeAttentionParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ char raw[];
  char* smem = raw + (1024 - shared_address(raw) % 1024) % 1024;
  grid_dependency_wait();
  grid_dependency_launch();
  AttentionWarpgroups<T, kDim, kGroups> groups(p, smem);
  for (int index = blockIdx.x; index >= 0;) index = groups.run(index);
#endif
}

}  // namespace dendrite
