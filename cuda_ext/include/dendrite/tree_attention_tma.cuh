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

#include "tree_attention_producer.cuh"
#include "tree_attention_rows.cuh"

namespace dendrite {

template <class T, int kDim, int kGroups, class Shared = AttentionSharedTma<kDim, kGroups>>
class AttentionConsumer {
  using Place = typename Shared::Place;
  static constexpr int kTile = Shared::kTile;
  using Scores = float[1][2 * kTile][4];
  static constexpr int kSteps = kDim / 16;

 public:
  DENDRITE_DEVICE AttentionConsumer(const TreeAttentionParams& p, const Shared& shared)
      : p_(p), shared_(shared), warp_(shfl(threadIdx.x / 32, 0)), end_(0) {}

  // Takes the segments of the block's worker, of which this is the first.
  DENDRITE_DEVICE void run_all(WorkSegment segment) {
    begin(segment);
    grid_dependency_wait();
    if (segment.count == 0) return;
    for (int index = blockIdx.x;;) {
      index = run(index, segment);
      if (index < 0) break;
      segment = whole_segment(p_, index);
      begin(segment);
    }
  }

 private:
  // What a segment needs of the work list and the positions alone.
  DENDRITE_DEVICE void begin(const WorkSegment& segment) {
    end_ += (segment.count + kTile - 1) / kTile;
    rows_.start(p_, segment, first_query());
  }

  // Takes the segment that was begun; returns the worker's next one, or -1.
  DENDRITE_DEVICE int run(int index, const WorkSegment& segment) {
    rows_.load_queries(p_, segment.row_begin, blockIdx.y, q_);
    for (seek(); here_.tile < end_; seek()) attend();
    const WorkSegment done = whole_segment(p_, index);  // not worth registers in the main loop
    rows_.template finish<64 * kGroups>(p_, done, blockIdx.y);
    return done.next;
  }

  struct Entries {
    SharedAddress base;
    DENDRITE_DEVICE WorkEntry operator[](int j) const {
      return work_entry(load_shared_16(base + j * int(sizeof(WorkEntry))));
    }
  };

  static DENDRITE_DEVICE int lane() { return threadIdx.x % 32; }
  DENDRITE_DEVICE int group() const { return kGroups == 1 ? 0 : warp_ / 4; }
  DENDRITE_DEVICE int first_query() const { return warp_ * 16; }

  DENDRITE_DEVICE void release(SharedAddress barrier) const {
    sync_warp();
    if (lane() == 0) mbarrier_arrive(barrier);
  }

  // Whether this warpgroup reads a tile, whose keys are at hand afterwards. Sets whole_.
  DENDRITE_DEVICE bool peek(const Place& at) {
    mbarrier_wait(shared_.keys_full(at), at.parity);
    const uint4 words = load_shared_16(shared_.summary(at.tile));
    const TileSummary summary{int(words.x), int(words.y), int(words.z), int(words.w)};
    whole_ = all_sync(rows_.all_see(p_, summary.first(), summary.end, summary.low, summary.high));
    return any_sync(summary.read_by(group()));
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
    bool grows;
    do {
      grow(here_, s);
      release(shared_.keys_empty(here_));
      pack(s, weights);
      grows = false;
      for (Place next = here_.next(); next.tile < end_ && peek(next); next = here_.next()) {
        start_scores(next, s);
        mbarrier_wait(shared_.values_full(here_), here_.parity);
        start_values(here_, weights);
        wgmma_wait<1>();
        hold(s[0]);
        scale_scores(next, s);
        mask(next, s);
        grows = !weigh(s);
        if (!grows) {
          scale_weights(next, s, 0, kTile);
          release(shared_.keys_empty(next));
        }
        wgmma_wait<0>();
        hold(rows_.o[0]);
        release(shared_.values_empty(here_));
        here_ = next;
        if (grows) break;
        pack(s, weights);
      }
    } while (grows);
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
      wgmma_keys<T>(s[0], q_[k], advance(keys, k / 4 * Shared::kKeyPanelBytes + k % 4 * 32), k > 0);
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

  // Multiplies the scores of a tile with the scales of its keys, and weights of entries [first, last)
  // with those of the values; both lie beside the keys, and go with them.
  DENDRITE_DEVICE void scale_scores(const Place& at, Scores& s) const {
    if constexpr (Shared::kScaled) multiply(shared_.key_scales(at), s, 0, kTile);
  }
  DENDRITE_DEVICE void scale_weights(const Place& at, Scores& s, int first, int last) const {
    if constexpr (Shared::kScaled) multiply(shared_.value_scales(at), s, first, last);
  }
  static DENDRITE_DEVICE void multiply(SharedAddress by, Scores& s, int first, int last) {
#pragma unroll
    for (int n = 0; n < 2 * kTile; ++n) {
      if (n / 2 < first || n / 2 >= last) continue;
      const float2 factor = load_shared_floats(by + (n * 8 + lane() % 4 * 2) * 4);
      s[0][n][0] *= factor.x;
      s[0][n][1] *= factor.y;
      s[0][n][2] *= factor.x;
      s[0][n][3] *= factor.y;
    }
  }

  // Hides what rows may not see.
  DENDRITE_DEVICE void mask(const Place& at, Scores& s) const {
    if (!whole_) rows_.template mask<kTile>(p_, Entries{shared_.entries(at.tile)}, s);
  }

  // Turns scores into weights; false, and of no use, when a maximum of the warpgroup has to grow.
  DENDRITE_DEVICE bool weigh(Scores& s) {
    float sums[1][2] = {{rows_.l[0][0], rows_.l[0][1]}};
    const bool grows = rows_.template weigh<kTile>(p_.scale_log2, s, 0, kTile, sums);
    if (any_in_warpgroup(grows, 1 + group())) return false;
    rows_.l[0][0] = sums[0][0];
    rows_.l[0][1] = sums[0][1];
    return true;
  }

  // The weights of a tile, with maxima brought up to its scores. Usually it is a row's first entry
  // that does so; where it is a later one, the values of each entry are added before the next one.
  // No products may be under way.
  DENDRITE_DEVICE void grow(const Place& at, Scores& s) {
    scores(at, s);
    rows_.template begin<kTile>(p_.scale_log2, s);
    if (weigh(s)) {
      scale_weights(at, s, 0, kTile);
      return;
    }
    scores(at, s);
    one_by_one(at, s);
  }
  DENDRITE_DEVICE void scores(const Place& at, Scores& s) {
    start_scores(at, s);
    wgmma_wait<0>();
    hold(s[0]);
    scale_scores(at, s);
    mask(at, s);
  }

  // Leaves weights 0: what follows adds nothing.
  DENDRITE_DEVICE void one_by_one(const Place& at, Scores& s) {
    mbarrier_wait(shared_.values_full(at), at.parity);
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      rows_.template grow<kTile>(p_.scale_log2, s, j);
      rows_.template weigh<kTile>(p_.scale_log2, s, j, j + 1, rows_.l);
      scale_weights(at, s, j, j + 1);
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
      for (int c = 0; c < 4; ++c) s[0][n][c] = 0.f;
  }

  const TreeAttentionParams& p_;
  const Shared& shared_;
  const int warp_;  // told by a lane to all, so that the compiler knows that they agree
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
  grid_dependency_launch();
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
    constexpr int kMost = kGroups == 1 ? 200 : 224;
    static_assert(kRegistersSuffice<kGroups, 56, kMost>);
    take_registers<kMost>();
    AttentionConsumer<T, kDim, kGroups>(p, shared).run_all(segment);
  }
#else
  __trap();  // built without sm_90a: better no result than a wrong one
#endif
}

}  // namespace dendrite
