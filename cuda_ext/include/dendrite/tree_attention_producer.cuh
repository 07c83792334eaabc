// The warp that brings K and V in tree attention on Hopper.
#pragma once

#include "tree_attention_tma_shared.cuh"

namespace dendrite {

// Fills the stages. Tiles are counted through all segments of the worker.
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
        const uint4 summary = summarise<kTile, kGroups>(p_, work_entry(now), segment);
        for (; j < 32 && first + j < count; j += kTile) load_tile(now, summary, row, j);
      }
      if (segment.next < 0) return;
      segment = whole_segment(p_, segment.next);
      ahead = entry(segment, lane());
    }
  }

 private:
  // Tiles: 32 entries at most.
  static constexpr int kFirst = Shared::kStages * kTile < 32 ? Shared::kStages : 32 / kTile;
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

  // The lanes of a tile leave its entries and its summary.
  DENDRITE_DEVICE void store_entry(int tile, const uint4& entry, const uint4& summary) const {
    store_shared_16(shared_.entries(tile) + lane() % kTile * int(sizeof(WorkEntry)), entry);
    if (lane() % kTile == 0) store_shared_16(shared_.summary(tile), summary);
  }

  // Fills the stages for the first time. Only entries with tokens of this step wait for the kernels
  // ahead of this one: what the step writes elsewhere is copies of pages, and copy_pages_kernel has
  // ended before any kernel behind it starts.
  DENDRITE_DEVICE void begin(const WorkSegment& segment, const uint4& entry) {
    const uint32_t old = ballot((entry.z & kOld) != 0);
    const int row = first_row(entry);
    const int tiles = min(kFirst, (segment.count + kTile - 1) / kTile);
    const uint4 summary = summarise<kTile, kGroups>(p_, work_entry(entry), segment);
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
        load_box(shared_.keys(at) + panel * Shared::kKeyPanelBytes + i * kBoxBytes, keys_,
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

}  // namespace dendrite
