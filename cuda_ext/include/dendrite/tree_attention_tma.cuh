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

// What a tile's entries have in common, made once for all warps: in queries of the segment,
// [begin, end) read all of it; from which position to which; and which warpgroups read some of it.
struct TileSummary {
  int32_t begin, end, low;
  int32_t high;  // no row sees so far where some entry is not whole
  static constexpr int kReadersAt = 16;  // bits of `begin` from which on the warpgroups follow

  DENDRITE_DEVICE bool read_by(int group) const { return (begin >> (kReadersAt + group) & 1) != 0; }
  DENDRITE_DEVICE int first() const { return begin & ((1 << kReadersAt) - 1); }
};

template <int kDim, int kGroups>
struct AttentionSharedTma {
  static constexpr int kTile = kTileUnits;
  static constexpr int kStages = kGroups == 1 ? (kDim == 128 ? 3 : 6) : (kDim == 128 ? 6 : 8);
  static constexpr int kRing = kStages < 8 ? 8 : 16;  // tiles of entries: more than kStages
  static constexpr int kPanels = kDim / 64;
  static constexpr int kTileBytes = kPanels * kPanelBytes;  // of K, and of V
  static constexpr int kEntriesBytes = (kTile + 1) * int(sizeof(WorkEntry));  // and the summary
  static constexpr int kBarriersAt = 2 * kStages * kTileBytes;
  static constexpr int kEntriesAt = kBarriersAt + 4 * kStages * kMbarrierBytes;
  static constexpr int kBytes = kEntriesAt + kRing * kEntriesBytes + 1024;  // room to align

  // Where a tile is: tiles go through the stages in turn.
  struct Place {
    int tile = 0, stage = 0, parity = 0;
    DENDRITE_DEVICE void step() {
      ++tile;
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
    DENDRITE_DEVICE Place next() const {
      Place place = *this;
      place.step();
      return place;
    }
  };

  SharedAddress base;
  DENDRITE_DEVICE SharedAddress keys(const Place& at) const {
    return base + at.stage * 2 * kTileBytes;
  }
  DENDRITE_DEVICE SharedAddress values(const Place& at) const { return keys(at) + kTileBytes; }
  DENDRITE_DEVICE SharedAddress entries(int tile) const {
    return base + kEntriesAt + (tile & (kRing - 1)) * kEntriesBytes;
  }
  DENDRITE_DEVICE SharedAddress summary(int tile) const {
    return entries(tile) + kTile * int(sizeof(WorkEntry));
  }
  DENDRITE_DEVICE SharedAddress keys_full(const Place& at) const {
    return base + kBarriersAt + at.stage * 4 * kMbarrierBytes;
  }
  DENDRITE_DEVICE SharedAddress keys_empty(const Place& at) const {
    return keys_full(at) + kMbarrierBytes;
  }
  DENDRITE_DEVICE SharedAddress values_full(const Place& at) const {
    return keys_full(at) + 2 * kMbarrierBytes;
  }
  DENDRITE_DEVICE SharedAddress values_empty(const Place& at) const {
    return keys_full(at) + 3 * kMbarrierBytes;
  }

  DENDRITE_DEVICE void start_barriers() const {
    for (Place at; at.tile < kStages; at.step()) {
      mbarrier_init(keys_full(at), 1);
      mbarrier_init(values_full(at), 1);
      mbarrier_init(keys_empty(at), 4 * kGroups);  // one arrival of each warp
      mbarrier_init(values_empty(at), 4 * kGroups);
    }
    mbarrier_init_done();
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
  using Place = typename Shared::Place;
  static constexpr int kTile = Shared::kTile, kPanels = Shared::kPanels;
  static constexpr int kBoxBytes = kUnit * 128;  // a panel's part of one entry

 public:
  DENDRITE_DEVICE AttentionProducer(const TreeAttentionParams& p, const Shared& shared,
                                    const CUtensorMap* keys, const CUtensorMap* values)
      : p_(p), shared_(shared), keys_(keys), values_(values) {}

  DENDRITE_DEVICE void run(WorkSegment segment) {
    uint4 ahead = entry(segment, lane());
    begin(segment, ahead);
    for (int j = place_.tile * kTile;; j = 0) {
      const int count = segment.count;
      for (int first = 0; first < count; first += 32, j = 0) {
        const uint4 now = ahead;
        ahead = entry(segment, first + 32 + lane());
        const int row = first_row(now);
        const uint4 summary = summarise(work_entry(now), segment);
        for (; j < 32 && first + j < count; j += kTile) load_tile(now, summary, row, j);
      }
      if (segment.next < 0) return;
      segment = whole_segment(p_, segment.next);
      ahead = entry(segment, lane());
    }
  }

 private:
  static constexpr int kFirst = Shared::kStages < 8 ? Shared::kStages : 8;  // tiles: 32 entries at most
  static constexpr uint32_t kWholeTile = (1 << kTile) - 1;

  static DENDRITE_DEVICE int lane() { return threadIdx.x % 32; }

  // In the maps.
  DENDRITE_DEVICE int first_row(const uint4& entry) const {
    return int(entry_offset(p_, work_entry(entry), blockIdx.y, 1));
  }

  // Behind the last entry of a segment: padding.
  DENDRITE_DEVICE uint4 entry(const WorkSegment& segment, int index) const {
    if (index >= segment.count) return make_uint4(0, 0, 0, 0);
    return load_16(p_.work + segment.entries + 4 * index);
  }

  // A TileSummary, in all lanes that hold the tile's entries.
  DENDRITE_DEVICE uint4 summarise(const WorkEntry& entry, const WorkSegment& segment) const {
    int begin = first_reader(entry) * p_.group, end = end_of_readers(entry) * p_.group;
    int low = entry.pos, high = entry.len == kUnit ? entry.pos + kUnit - 1 : 0x7fffffff;
    int readers = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int limit = min(64 * (g + 1), segment.num_rows * p_.group);
      if (entry.len > 0 && begin < limit && end > 64 * g) readers |= 1 << g;
    }
#pragma unroll
    for (int mask = 1; mask < kTile; mask *= 2) {
      begin = max(begin, shfl_xor(begin, mask));
      end = min(end, shfl_xor(end, mask));
      low = min(low, shfl_xor(low, mask));
      high = max(high, shfl_xor(high, mask));
      readers |= shfl_xor(readers, mask);
    }
    return make_uint4(uint32_t(begin | readers << TileSummary::kReadersAt), uint32_t(end),
                      uint32_t(low), uint32_t(high));
  }

  // The lanes of a tile leave its entries and its summary.
  DENDRITE_DEVICE void store_entry(int tile, const uint4& entry, const uint4& summary) const {
    store_shared_16(shared_.entries(tile) + lane() % kTile * int(sizeof(WorkEntry)), entry);
    if (lane() % kTile == 0) store_shared_16(shared_.summary(tile), summary);
  }

  // Fills the stages for the first time. Only what the step itself has stored waits for the kernels
  // ahead of this one.
  DENDRITE_DEVICE void begin(const WorkSegment& segment, const uint4& entry) {
    const uint32_t old = ballot((entry.z & kOld) != 0);
    const int row = first_row(entry);
    const int tiles = min(kFirst, (segment.count + kTile - 1) / kTile);
    const uint4 summary = summarise(work_entry(entry), segment);
    if (lane() < tiles * kTile) store_entry(lane() / kTile, entry, summary);
    sync_warp();
    for (Place at; at.tile < tiles; at.step()) {
      if (lane() == 0) {
        mbarrier_arrive_and_expect(shared_.keys_full(at), Shared::kTileBytes);
        mbarrier_arrive_and_expect(shared_.values_full(at), Shared::kTileBytes);
      }
      load_boxes(at, row, old >> at.tile * kTile);
    }
    grid_dependency_wait();
    for (; place_.tile < tiles; place_.step())
      load_boxes(place_, row, ~old >> place_.tile * kTile);
  }

  // Keys and values of those entries that `chosen` has, of a tile among the first ones.
  DENDRITE_DEVICE void load_boxes(const Place& at, int row, uint32_t chosen) {
    int rows[kTile];
#pragma unroll
    for (int i = 0; i < kTile; ++i) rows[i] = shfl(row, at.tile * kTile + i);
    if (lane() != 0) return;
    load_keys(at, rows, chosen);
    load_values(at, rows, chosen);
  }

  // The tile is in lanes [j, j + kTile): entries and where they start in the maps.
  DENDRITE_DEVICE void load_tile(const uint4& entry, const uint4& summary, int row, int j) {
    int rows[kTile];
#pragma unroll
    for (int i = 0; i < kTile; ++i) rows[i] = shfl(row, j + i);
    mbarrier_wait(shared_.keys_empty(place_), place_.parity ^ 1);
    if (lane() / kTile * kTile == j) store_entry(place_.tile, entry, summary);
    sync_warp();
    if (lane() == 0) {
      mbarrier_arrive_and_expect(shared_.keys_full(place_), Shared::kTileBytes);
      load_keys(place_, rows, kWholeTile);
      mbarrier_wait(shared_.values_empty(place_), place_.parity ^ 1);
      mbarrier_arrive_and_expect(shared_.values_full(place_), Shared::kTileBytes);
      load_values(place_, rows, kWholeTile);
    }
    sync_warp();
    place_.step();
  }

  // One thread: the entries of a tile that `chosen` has.
  DENDRITE_DEVICE void load_keys(const Place& at, const int (&rows)[kTile], uint32_t chosen) {
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      if ((chosen >> i & 1) == 0) continue;
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel)
        load_box(shared_.keys(at) + panel * kPanelBytes + i * kBoxBytes, keys_,
                 shared_.keys_full(at), 0, rows[i], panel);
    }
  }
  DENDRITE_DEVICE void load_values(const Place& at, const int (&rows)[kTile], uint32_t chosen) {
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      if ((chosen >> i & 1) == 0) continue;
      load_box(shared_.values(at) + i * kPanels * kBoxBytes, values_, shared_.values_full(at), 0,
               rows[i], 0);
    }
  }

  const TreeAttentionParams& p_;
  const Shared& shared_;
  const CUtensorMap *keys_, *values_;
  Place place_;
};

template <class T, int kDim, int kGroups>
class AttentionConsumer {
  using Shared = AttentionSharedTma<kDim, kGroups>;
  using Place = typename Shared::Place;
  using Scores = float[1][2 * kTileUnits][4];
  static constexpr int kTile = Shared::kTile;
  static constexpr int kSteps = kDim / 16;

 public:
  DENDRITE_DEVICE AttentionConsumer(const TreeAttentionParams& p, const Shared& shared)
      : p_(p), shared_(shared), end_(0) {}

  // What a segment needs of the work list and the positions alone.
  DENDRITE_DEVICE void begin(const WorkSegment& segment) {
    end_ += (segment.count + kTile - 1) / kTile;
    rows_.start(p_, segment, first_query());
  }

  // Takes the segment that was begun; returns the worker's next one, or -1.
  DENDRITE_DEVICE int run(int index, const WorkSegment& segment) {
    load_queries(segment);
    seek();
    while (here_.tile < end_) {
      attend();
      seek();
    }
    const WorkSegment done = whole_segment(p_, index);  // not worth registers in the main loop
    rows_.template finish<64 * kGroups>(p_, done, blockIdx.y);
    return done.next;
  }

 private:
  struct Entries {
    SharedAddress base;
    DENDRITE_DEVICE WorkEntry operator[](int j) const {
      return work_entry(load_shared_16(base + j * int(sizeof(WorkEntry))));
    }
  };

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

  DENDRITE_DEVICE void release(SharedAddress barrier) const {
    sync_warp();
    if (lane() == 0) mbarrier_arrive(barrier);
  }

  // Whether this warpgroup reads a tile, whose keys are at hand afterwards. Sets whole_.
  DENDRITE_DEVICE bool peek(const Place& at) {
    mbarrier_wait(shared_.keys_full(at), at.parity);
    const uint4 words = load_shared_16(shared_.summary(at.tile));
    const TileSummary summary{int(words.x), int(words.y), int(words.z), int(words.w)};
    whole_ = rows_.all_see(p_, summary.first(), summary.end, summary.low, summary.high);
    return summary.read_by(group());
  }

  // Goes to the next tile that this warpgroup reads, or to the end. Nothing may be under way: the
  // tiles passed over come through all stages, and a stage that is held would stop them.
  DENDRITE_DEVICE void seek() {
    for (; here_.tile < end_ && !peek(here_); here_.step()) {
      mbarrier_wait(shared_.values_full(here_), here_.parity);
      release(shared_.keys_empty(here_));
      release(shared_.values_empty(here_));
    }
  }

  // This tile and those behind it, up to the first one that is not read. While the values of one are
  // under way the next one becomes weights.
  DENDRITE_DEVICE void attend() {
    Scores s;
    uint32_t weights[kTile][4];
    start_scores(here_, s);
    wgmma_wait<0>();
    hold(s[0]);
    release(shared_.keys_empty(here_));
    if (mask_and_check(here_, s)) grow(here_, s);
    rows_.template weigh<kTile>(p_.scale_log2, s, 0, kTile);
    pack(s, weights);
    for (Place next = here_.next(); next.tile < end_ && peek(next); next = here_.next()) {
      mbarrier_wait(shared_.values_full(here_), here_.parity);
      start_scores(next, s);
      start_values(here_, weights);
      wgmma_wait<1>();
      hold(s[0]);
      release(shared_.keys_empty(next));
      const bool grows = mask_and_check(next, s);
      if (!grows) rows_.template weigh<kTile>(p_.scale_log2, s, 0, kTile);
      wgmma_wait<0>();
      hold(rows_.o[0]);
      release(shared_.values_empty(here_));
      if (grows) {
        grow(next, s);
        rows_.template weigh<kTile>(p_.scale_log2, s, 0, kTile);
      }
      pack(s, weights);
      here_ = next;
    }
    mbarrier_wait(shared_.values_full(here_), here_.parity);
    start_values(here_, weights);
    wgmma_wait<0>();
    hold(rows_.o[0]);
    release(shared_.values_empty(here_));
    here_.step();
  }

  // Sends the products of the queries with a tile's keys on their way.
  DENDRITE_DEVICE void start_scores(const Place& at, Scores& s) {
    const uint64_t keys = k_major(shared_.keys(at));
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
  DENDRITE_DEVICE void start_values(const Place& at, const uint32_t (&weights)[kTile][4]) {
    const uint64_t values = n_major<kUnit * 128>(shared_.values(at));
    hold(rows_.o[0]);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < kTile; ++j) add_values(values, j, weights[j]);
    wgmma_commit();
    hold(rows_.o[0]);
  }

  // Hides what rows may not see; whether a maximum of the warpgroup has to grow.
  DENDRITE_DEVICE bool mask_and_check(const Place& at, Scores& s) const {
    if (!whole_) rows_.template mask<kTile>(p_, Entries{shared_.entries(at.tile)}, s);
    return too_large(s);
  }
  DENDRITE_DEVICE bool too_large(const Scores& s) const {
    return any_in_warpgroup(rows_.template grows<kTile>(p_.scale_log2, s), 1 + group());
  }

  // Brings the maxima up to the scores. Usually it is a row's first entry that does; where it is a
  // later one, the values of each entry are added before the next one.
  DENDRITE_DEVICE void grow(const Place& at, Scores& s) {
    begin_rows(s);
    rows_.template grow<kTile>(p_.scale_log2, s, 0);
    if (too_large(s)) one_by_one(at, s);
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
  DENDRITE_DEVICE void one_by_one(const Place& at, Scores& s) {
    mbarrier_wait(shared_.values_full(at), at.parity);
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      if (j > 0) rows_.template grow<kTile>(p_.scale_log2, s, j);
      rows_.template weigh<kTile>(p_.scale_log2, s, j, j + 1);
      uint32_t a[4];
      rows_.template pack<kTile>(s[0], j, a);
      hold(rows_.o[0]);
      wgmma_fence();
      add_values(n_major<kUnit * 128>(shared_.values(at)), j, a);
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
  Place here_;
  int end_;  // tiles up to the end of the segment
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
  const AttentionSharedTma<kDim, kGroups> shared{kept((shared_address(raw) + 1023) / 1024 * 1024)};
  // The list is there before the first kernel of a step begins: no need to wait for the last one.
  WorkSegment segment = whole_segment(p, blockIdx.x);
  if (threadIdx.x == kConsumers) {
    shared.start_barriers();
    prefetch_tensor_map(&keys);
    prefetch_tensor_map(&values);
  }
  sync_block();
  if (threadIdx.x >= kConsumers) {
    give_registers<56>();
    if (threadIdx.x >= kConsumers + 32) return;
    if (segment.count > 0)
      AttentionProducer<kDim, kGroups>(p, shared, &keys, &values).run(segment);
  } else {
    take_registers<kGroups == 1 ? 200 : 224>();
    AttentionConsumer<T, kDim, kGroups> consumer(p, shared);
    consumer.begin(segment);
    grid_dependency_launch();
    grid_dependency_wait();
    if (segment.count == 0) return;
    for (int index = blockIdx.x;;) {
      index = consumer.run(index, segment);
      if (index < 0) break;
      segment = whole_segment(p, index);
      consumer.begin(segment);
    }
  }
#else
  __trap();  // built without sm_90a: better no result than a wrong one
#endif
}

}  // namespace dendrite
