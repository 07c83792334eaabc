// Tree attention on Hopper: a warp brings K and V by bulk copies, warpgroups compute.
//
// Work, masking, softmax and the order of a row's operations are those of tree_attention.cuh; the
// products of an entry are the same k16 steps. A warpgroup owns 64 queries, kept in registers;
// kGroups of them share the tiles of K and V, kStages deep. They wait for tiles and for nothing
// else, so that the softmax of one runs beside the products of another. Within a warpgroup the
// scores of the next tile and the values of the one before are under way during a tile's softmax.
//
// A copy brings 16 slots whatever an entry's length: slots behind it get weight 0, and the values
// of all pages are finite (rope_store.cuh sees to it).
#pragma once

#include "tma.cuh"
#include "tree_attention_rows.cuh"
#include "wgmma.cuh"

namespace dendrite {

template <int kDim, int kGroups>
struct AttentionSharedTma {
  static constexpr int kTile = kTileUnits;
  static constexpr int kStages = kGroups == 1 ? (kDim == 128 ? 3 : 6) : (kDim == 128 ? 6 : 8);
  static constexpr int kRing = kStages < 8 ? 8 : 16;  // tiles of entries: more than kStages
  static constexpr int kPanels = kDim / 64;
  static constexpr int kTileBytes = kPanels * kPanelBytes;  // of K, and of V
  static constexpr int kBarriersAt = 2 * kStages * kTileBytes;
  static constexpr int kEntriesAt = kBarriersAt + 4 * kStages * int(sizeof(Mbarrier));
  static constexpr int kPositionsAt = kEntriesAt + kRing * kTile * int(sizeof(WorkEntry));
  static constexpr int kBytes = kPositionsAt + kGroups * 64 * 4 + 1024;  // room to align

  char* smem;
  DENDRITE_DEVICE char* keys(int t) const { return smem + t % kStages * 2 * kTileBytes; }
  DENDRITE_DEVICE char* values(int t) const { return keys(t) + kTileBytes; }
  DENDRITE_DEVICE WorkEntry* entries(int t) const {
    return reinterpret_cast<WorkEntry*>(smem + kEntriesAt) + t % kRing * kTile;
  }
  DENDRITE_DEVICE int32_t* positions() const {
    return reinterpret_cast<int32_t*>(smem + kPositionsAt);
  }
  DENDRITE_DEVICE Mbarrier* keys_full(int t) const { return barriers() + t % kStages * 4; }
  DENDRITE_DEVICE Mbarrier* keys_empty(int t) const { return keys_full(t) + 1; }
  DENDRITE_DEVICE Mbarrier* values_full(int t) const { return keys_full(t) + 2; }
  DENDRITE_DEVICE Mbarrier* values_empty(int t) const { return keys_full(t) + 3; }
  static DENDRITE_DEVICE int parity(int t) { return t / kStages & 1; }

  DENDRITE_DEVICE void start_barriers() const {
    for (int t = 0; t < kStages; ++t) {
      mbarrier_init(keys_full(t), 1);
      mbarrier_init(values_full(t), 1);
      mbarrier_init(keys_empty(t), 4 * kGroups);  // one arrival of each warp
      mbarrier_init(values_empty(t), 4 * kGroups);
    }
    mbarrier_init_done();
  }

 private:
  DENDRITE_DEVICE Mbarrier* barriers() const {
    return reinterpret_cast<Mbarrier*>(smem + kBarriersAt);
  }
};

DENDRITE_DEVICE WorkEntry work_entry(const uint4& words) {
  return {int32_t(words.x), int32_t(words.y), words.z, int32_t(words.w)};
}

// read_segment in two loads.
DENDRITE_DEVICE WorkSegment whole_segment(const TreeAttentionParams& p, int index) {
  const int32_t* at = p.work + p.segments_at + 8 * index;
  const uint4 a = load_16(at), b = load_16(at + 4);
  return {int32_t(a.x), int32_t(a.y), int32_t(a.z), int32_t(a.w),
          int32_t(b.x), int32_t(b.y), int32_t(b.z), int32_t(b.w)};
}

// The warp that fills the stages. Tiles are counted through all segments of the worker.
template <int kDim, int kGroups>
class AttentionProducer {
  using Shared = AttentionSharedTma<kDim, kGroups>;
  static constexpr int kTile = Shared::kTile, kPanels = Shared::kPanels;
  static constexpr int kBoxBytes = kUnit * 128;  // a panel's part of one entry

 public:
  DENDRITE_DEVICE AttentionProducer(const TreeAttentionParams& p, const Shared& shared,
                                    const CUtensorMap* keys, const CUtensorMap* values)
      : p_(p), shared_(shared), keys_(keys), values_(values) {}

  DENDRITE_DEVICE void run(WorkSegment segment) {
    uint4 ahead = entry(segment, lane());
    grid_dependency_wait();
    for (int t = 0;;) {
      const int count = segment.count;
      for (int first = 0; first < count; first += 32) {
        const uint4 now = ahead;
        ahead = entry(segment, first + 32 + lane());
        const int row = int(entry_offset(p_, work_entry(now), blockIdx.y, 1));
        for (int j = 0; j < 32 && first + j < count; j += kTile) load_tile(t++, now, row, j);
      }
      if (segment.next < 0) return;
      segment = whole_segment(p_, segment.next);
      ahead = entry(segment, lane());
    }
  }

 private:
  static DENDRITE_DEVICE int lane() { return threadIdx.x % 32; }

  // Behind the last entry of a segment: padding.
  DENDRITE_DEVICE uint4 entry(const WorkSegment& segment, int index) const {
    if (index >= segment.count) return make_uint4(0, 0, 0, 0);
    return load_16(p_.work + segment.entries + 4 * index);
  }

  // The tile is in lanes [j, j + kTile): entries and where they start in the maps.
  DENDRITE_DEVICE void load_tile(int t, const uint4& entry, int row, int j) {
    int rows[kTile];
#pragma unroll
    for (int i = 0; i < kTile; ++i) rows[i] = shfl(row, j + i);
    const int parity = Shared::parity(t) ^ 1;
    mbarrier_wait(shared_.keys_empty(t), parity);
    if (lane() / kTile * kTile == j) store_16(shared_.entries(t) + lane() % kTile, entry);
    sync_warp();
    if (lane() == 0) {
      mbarrier_arrive_and_expect(shared_.keys_full(t), Shared::kTileBytes);
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel)
          load_box(shared_.keys(t) + panel * kPanelBytes + i * kBoxBytes, keys_,
                   shared_.keys_full(t), 0, rows[i], panel);
      }
      mbarrier_wait(shared_.values_empty(t), parity);
      mbarrier_arrive_and_expect(shared_.values_full(t), Shared::kTileBytes);
#pragma unroll
      for (int i = 0; i < kTile; ++i)
        load_box(shared_.values(t) + i * kPanels * kBoxBytes, values_, shared_.values_full(t), 0,
                 rows[i], 0);
    }
    sync_warp();
  }

  const TreeAttentionParams& p_;
  const Shared& shared_;
  const CUtensorMap *keys_, *values_;
};

template <class T, int kDim, int kGroups>
class AttentionConsumer {
  using Shared = AttentionSharedTma<kDim, kGroups>;
  using Scores = float[1][2 * kTileUnits][4];
  static constexpr int kTile = Shared::kTile;
  static constexpr int kSteps = kDim / 16;

 public:
  DENDRITE_DEVICE AttentionConsumer(const TreeAttentionParams& p, const Shared& shared)
      : p_(p), shared_(shared), begin_(0) {}

  // Takes one segment; returns the worker's next one, or -1.
  DENDRITE_DEVICE int run(int index, const WorkSegment& segment) {
    end_ = begin_ + (segment.count + kTile - 1) / kTile;
    load_queries(segment);
    sync_warp();
    rows_.start(p_, segment, first_query(), shared_.positions());
    sync_warp();
    for (int t = seek(begin_); t < end_;) t = seek(attend(t));
    begin_ = end_;
    const WorkSegment done = whole_segment(p_, index);  // not worth registers in the main loop
    rows_.template finish<64 * kGroups>(p_, done, blockIdx.y);
    return done.next;
  }

 private:
  static DENDRITE_DEVICE int lane() { return threadIdx.x % 32; }
  static DENDRITE_DEVICE int group() { return kGroups == 1 ? 0 : threadIdx.x / 128; }

  static DENDRITE_DEVICE int first_query() { return threadIdx.x / 32 * 16; }

  DENDRITE_DEVICE void load_queries(const WorkSegment& segment) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = first_query() + half * 8 + lane() / 4;
      const bool valid = i < segment.num_rows * p_.group;
      const T* q = static_cast<const T*>(p_.q) + lane() % 4 * 2 +
                   (valid ? query_offset(p_, segment.row_begin, i, blockIdx.y, kDim) : 0);
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        q_[k][half] = valid ? *reinterpret_cast<const uint32_t*>(q + k * 16) : 0u;
        q_[k][half + 2] = valid ? *reinterpret_cast<const uint32_t*>(q + k * 16 + 8) : 0u;
      }
    }
  }

  DENDRITE_DEVICE void release(Mbarrier* barrier) const {
    sync_warp();
    if (lane() == 0) mbarrier_arrive(barrier);
  }

  // Whether this warpgroup reads tile t, whose keys are at hand afterwards. Sets whole_.
  DENDRITE_DEVICE bool peek(int t) {
    mbarrier_wait(shared_.keys_full(t), Shared::parity(t));
    const WorkEntry entry = work_entry(load_16(shared_.entries(t) + lane() % kTile));
    whole_ = all_sync(rows_.all_see(p_, entry));
    return any_sync(rows_.reads(p_, entry, group() * 64, group() * 64 + 64));
  }

  // The first tile from t on that this warpgroup reads, or end_. Nothing may be under way: the tiles
  // passed over come through all stages, and a stage that is held would stop them.
  DENDRITE_DEVICE int seek(int t) {
    for (; t < end_ && !peek(t); ++t) {
      mbarrier_wait(shared_.values_full(t), Shared::parity(t));
      release(shared_.keys_empty(t));
      release(shared_.values_empty(t));
    }
    return t;
  }

  // Tile t and those behind it, up to the first one that is not read, which is returned. While the
  // values of one are under way the next one becomes weights.
  DENDRITE_DEVICE int attend(int t) {
    Scores s;
    uint32_t weights[kTile][4];
    start_scores(t, s);
    wgmma_wait<0>();
    hold(s[0]);
    release(shared_.keys_empty(t));
    if (mask_and_check(t, s)) grow(t, s);
    rows_.template weigh<kTile>(p_.scale_log2, s, 0, kTile);
    pack(s, weights);
    for (; t + 1 < end_ && peek(t + 1); ++t) {
      mbarrier_wait(shared_.values_full(t), Shared::parity(t));
      start_scores(t + 1, s);
      start_values(t, weights);
      wgmma_wait<1>();
      hold(s[0]);
      release(shared_.keys_empty(t + 1));
      const bool grows = mask_and_check(t + 1, s);
      if (!grows) rows_.template weigh<kTile>(p_.scale_log2, s, 0, kTile);
      wgmma_wait<0>();
      hold(rows_.o[0]);
      release(shared_.values_empty(t));
      if (grows) {
        grow(t + 1, s);
        rows_.template weigh<kTile>(p_.scale_log2, s, 0, kTile);
      }
      pack(s, weights);
    }
    mbarrier_wait(shared_.values_full(t), Shared::parity(t));
    start_values(t, weights);
    wgmma_wait<0>();
    hold(rows_.o[0]);
    release(shared_.values_empty(t));
    return t + 1;
  }

  // Sends the products of the queries with a tile's keys on their way.
  DENDRITE_DEVICE void start_scores(int t, Scores& s) {
    const uint64_t keys = k_major(shared_.keys(t));
    hold(s[0]);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
      wgmma_keys<T>(s[0], q_[k], advance(keys, k / 4 * kPanelBytes + k % 4 * 32), k > 0);
    wgmma_commit();
    hold(s[0]);
  }

  static DENDRITE_DEVICE void pack(const Scores& s, uint32_t (&weights)[kTile][4]) {
#pragma unroll
    for (int j = 0; j < kTile; ++j)
      AttentionRows<T, kDim, 1>::template pack<kTile>(s[0], j, weights[j]);
  }

  // O += weights of entry j times its values.
  DENDRITE_DEVICE void add_values(uint64_t values, int j, const uint32_t (&weights)[4]) {
    wgmma_values<T, kDim / 8>(rows_.o[0], weights, advance(values, j * kUnit * kDim * 2));
  }

  // The same for a tile, left under way.
  DENDRITE_DEVICE void start_values(int t, const uint32_t (&weights)[kTile][4]) {
    const uint64_t values = n_major<kUnit * 128>(shared_.values(t));
    hold(rows_.o[0]);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < kTile; ++j) add_values(values, j, weights[j]);
    wgmma_commit();
    hold(rows_.o[0]);
  }

  // Hides what rows may not see; whether a maximum of the warpgroup has to grow.
  DENDRITE_DEVICE bool mask_and_check(int t, Scores& s) const {
    if (!whole_) rows_.template mask<kTile>(p_, shared_.entries(t), s);
    return too_large(s);
  }
  DENDRITE_DEVICE bool too_large(const Scores& s) const {
    return any_in_warpgroup(rows_.template grows<kTile>(p_.scale_log2, s), 1 + group());
  }

  // Brings the maxima up to the scores. Usually it is a row's first entry that does; where it is a
  // later one, the values of each entry are added before the next one.
  DENDRITE_DEVICE void grow(int t, Scores& s) {
    begin_rows(s);
    rows_.template grow<kTile>(p_.scale_log2, s, 0);
    if (too_large(s)) one_by_one(t, s);
  }

  // A row without a maximum takes that of its first entry: so far it has nothing to scale.
  DENDRITE_DEVICE void begin_rows(const Scores& s) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& m = rows_.m[0][half];
      float largest[kTile];
#pragma unroll
      for (int j = 0; j < kTile; ++j) {
        const int h = half * 2;
        float top = fmaxf(fmaxf(kMinusInf, s[0][2 * j][h]), s[0][2 * j][h + 1]);
        top = fmaxf(fmaxf(top, s[0][2 * j + 1][h]), s[0][2 * j + 1][h + 1]);
        top = fmaxf(top, shfl_xor(top, 1));
        largest[j] = fmaxf(top, shfl_xor(top, 2));
      }
#pragma unroll
      for (int j = 0; j < kTile; ++j)
        if (m == kMinusInf && largest[j] > kMinusInf) m = largest[j] * p_.scale_log2;
    }
  }

  // Leaves no score: what follows adds nothing.
  DENDRITE_DEVICE void one_by_one(int t, Scores& s) {
    mbarrier_wait(shared_.values_full(t), Shared::parity(t));
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      if (j > 0) rows_.template grow<kTile>(p_.scale_log2, s, j);
      rows_.template weigh<kTile>(p_.scale_log2, s, j, j + 1);
      uint32_t a[4];
      rows_.template pack<kTile>(s[0], j, a);
      hold(rows_.o[0]);
      wgmma_fence();
      add_values(n_major<kUnit * 128>(shared_.values(t)), j, a);
      wgmma_commit();
      wgmma_wait<0>();
      hold(rows_.o[0]);
    }
#pragma unroll
    for (int n = 0; n < 2 * kTile; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c) s[0][n][c] = kMinusInf;
  }

  const TreeAttentionParams& p_;
  const Shared& shared_;
  int begin_, end_;
  bool whole_;  // all rows of the warp see all of the tile that was sought last
  uint32_t q_[kSteps][4];
  AttentionRows<T, kDim, 1> rows_;
};

// `keys` and `values`: the layer's pages as [kDim / 64][rows of all pages][64], in boxes of 16 rows
// and one panel (keys) or all of them (values).
template <class T, int kDim, int kGroups>
__global__ void __launch_bounds__(128 * (kGroups + 1), kGroups == 1 ? 2 : 1)
tree_attention_tma_kernel(const __grid_constant__ TreeAttentionParams p,
                          const __grid_constant__ CUtensorMap keys,
                          const __grid_constant__ CUtensorMap values) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kConsumers = 128 * kGroups;
  extern __shared__ char raw[];
  const AttentionSharedTma<kDim, kGroups> shared{raw + (1024 - shared_address(raw) % 1024) % 1024};
  // The list is there before the first kernel of a step begins: no need to wait for the last one.
  WorkSegment segment = whole_segment(p, blockIdx.x);
  if (threadIdx.x == kConsumers) {
    shared.start_barriers();
    prefetch_tensor_map(&keys);
    prefetch_tensor_map(&values);
  }
  sync_block();
  if (threadIdx.x >= kConsumers) {
    give_registers<40>();
    if (threadIdx.x >= kConsumers + 32) return;
    if (segment.count > 0)
      AttentionProducer<kDim, kGroups>(p, shared, &keys, &values).run(segment);
  } else {
    take_registers<kGroups == 1 ? 216 : 232>();
    grid_dependency_launch();
    grid_dependency_wait();
    if (segment.count == 0) return;
    AttentionConsumer<T, kDim, kGroups> consumer(p, shared);
    for (int index = blockIdx.x;;) {
      index = consumer.run(index, segment);
      if (index < 0) break;
      segment = whole_segment(p, index);
    }
  }
#else
  __trap();  // built without sm_90a: better no result than a wrong one
#endif
}

}  // namespace dendrite
