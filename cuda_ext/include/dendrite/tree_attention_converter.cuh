// The warpgroup that brings packed pages in tree attention on Hopper: bulk copies bring cells of codes,
// its threads make panels of numbers out of them.
#pragma once

#include "tree_attention_packed.cuh"
#include "tree_attention_tma_shared.cuh"

namespace dendrite {

// Behind the stages: the ring of tiles of cells, and a barrier for each.
template <int kDim, int kGroups>
struct AttentionSharedPacked
    : AttentionStages<kDim, kGroups, (kGroups == 2 ? 4 : kDim == 128 ? 2 : 3), true> {
  using Stages = AttentionStages<kDim, kGroups, (kGroups == 2 ? 4 : kDim == 128 ? 2 : 3), true>;
  using Stages::Stages;
  static constexpr int kMaxCells = 8;  // tiles of cells at most; with kStages fewer than kRing
  static constexpr int kCellBarriersAt = Stages::kEnd;
  static constexpr int kCellsAt = (kCellBarriersAt + kMaxCells * kMbarrierBytes + 127) / 128 * 128;
  // What a block may have, of 227 KB, where kGroups is 1 half of that.
  static constexpr int kBytes = (kGroups == 1 ? 113 : 226) * 1024;
  static constexpr int kCellsBytes = kBytes - 1024 - kCellsAt;
  static_assert(kMaxCells + Stages::kStages < Stages::kRing);

  // Tiles of cells that fit; 0: the other kernel is for such pages.
  static constexpr int tiles_of_cells(int cell_bytes) {
    const int tiles = kCellsBytes / (Stages::kTile * cell_bytes);
    return tiles < kMaxCells ? tiles : kMaxCells;
  }

  DENDRITE_DEVICE SharedAddress cells_full(int slot) const {
    return this->base + kCellBarriersAt + slot * kMbarrierBytes;
  }
  DENDRITE_DEVICE SharedAddress cells(int slot, int cell_bytes) const {
    return this->base + kCellsAt + slot * Stages::kTile * cell_bytes;
  }
  DENDRITE_DEVICE void start_cell_barriers() const {
    for (int slot = 0; slot < kMaxCells; ++slot) mbarrier_init(cells_full(slot), 1);
  }
};

// The tiles of a worker's segments, in order.
template <int kTile>
struct TileCursor {
  const TreeAttentionParams& p;
  WorkSegment segment;
  int first = 0;  // entry of the segment
  bool done;

  DENDRITE_DEVICE TileCursor(const TreeAttentionParams& p, const WorkSegment& segment)
      : p(p), segment(segment), done(segment.count == 0) {}
  DENDRITE_DEVICE void step() {
    first += kTile;
    if (first < segment.count) return;
    done = segment.next < 0;
    if (!done) segment = whole_segment(p, segment.next);
    first = 0;
  }
};

template <class T, int kDim, int kGroups>
class AttentionConverter {
  using Shared = AttentionSharedPacked<kDim, kGroups>;
  using Place = typename Shared::Place;
  static constexpr int kTile = Shared::kTile;
  static constexpr int kThreads = 128;
  static constexpr int kSlots = kTile * kUnit;
  static constexpr int kChunks = kDim / 8;
  static constexpr int kBarrier = 1 + kGroups;  // of these threads; the others are the consumers'

 public:
  DENDRITE_DEVICE AttentionConverter(const TreeAttentionPackedParams& p, const Shared& shared)
      : p_(p), shared_(shared) {}

  DENDRITE_DEVICE void run(const WorkSegment& segment) {
    TileCursor<kTile> ahead(p_, segment);
    int left = 0;  // tiles whose cells are on their way or there
    uint4 entry = begin(ahead, left);
    for (int slot = 0, parity = 0; left > 0; --left) {
      mbarrier_wait(shared_.cells_full(slot), parity);
      convert(slot);
      sync_some(kBarrier, kThreads);  // the cells are free
      if (!ahead.done) {
        if (warp() == 0)
          load(place_.tile + p_.cell_tiles, slot, entry, ahead, 0xffffffffu, true);
        ahead.step();
        ++left;
        entry = entry_of(ahead);
      }
      place_.step();
      if (++slot == p_.cell_tiles) slot = 0, parity ^= 1;
    }
  }

 private:
  // As a pointer that the compiler knows to be one to shared memory.
  static DENDRITE_DEVICE const char* pointer(SharedAddress address) {
    DENDRITE_SHARED_MEMORY(const char, memory);
    return memory + (address - shared_address(memory));
  }

  static DENDRITE_DEVICE int thread() { return threadIdx.x % kThreads; }
  static DENDRITE_DEVICE int lane() { return threadIdx.x % 32; }
  static DENDRITE_DEVICE int warp() { return thread() / 32; }

  // Entry `lane` of the cursor's tile; behind the last one of a segment: padding.
  DENDRITE_DEVICE uint4 entry_of(const TileCursor<kTile>& at) const {
    const int index = at.first + lane();
    if (at.done || lane() >= kTile || index >= at.segment.count) return make_uint4(0, 0, 0, 0);
    return load_16(p_.work + at.segment.entries + 4 * index);
  }

  // The first tiles of cells. Only entries with tokens of this step wait for the kernels ahead of this
  // one; see AttentionProducer.
  DENDRITE_DEVICE uint4 begin(TileCursor<kTile>& ahead, int& left) {
    TileCursor<kTile> again = ahead;
    for (; left < p_.cell_tiles && !ahead.done; ++left, ahead.step()) {
      const uint4 entry = entry_of(ahead);
      if (warp() == 0) load(left, left, entry, ahead, ballot((entry.z & kOld) != 0), true);
    }
    if (warp() == 0) {
      grid_dependency_wait();
      for (int tile = 0; tile < left; ++tile, again.step()) {
        const uint4 entry = entry_of(again);
        load(tile, tile, entry, again, ~ballot((entry.z & kOld) != 0), false);
      }
    }
    sync_some(kBarrier, kThreads);
    return entry_of(ahead);
  }

  // The cells of those entries that `chosen` has; the first time (`opens`) what consumers need to know
  // of the tile, too.
  DENDRITE_DEVICE void load(int tile, int slot, const uint4& entry, const TileCursor<kTile>& at,
                            uint32_t chosen, bool opens) const {
    const WorkEntry mine = work_entry(entry);
    if (opens) {
      const uint4 summary = summarise<kTile, kGroups>(p_, mine, at.segment);
      if (lane() < kTile)
        store_shared_16(shared_.entries(tile) + lane() * int(sizeof(WorkEntry)), entry);
      if (lane() == 0) store_shared_16(shared_.summary(tile), summary);
      sync_warp();
      if (lane() == 0) mbarrier_arrive_and_expect(shared_.cells_full(slot), kTile * p_.cell_bytes);
      sync_warp();
    }
    if (lane() < kTile && (chosen >> lane() & 1) != 0)
      load_bytes(shared_.cells(slot, p_.cell_bytes) + lane() * p_.cell_bytes,
                 entry_cell(p_, mine, blockIdx.y), p_.cell_bytes, shared_.cells_full(slot));
  }

  DENDRITE_DEVICE void convert(int slot) {
    const PackedLayer& layer = p_.layer;
    const SharedAddress cells = shared_.cells(slot, p_.cell_bytes);
    mbarrier_wait(shared_.keys_empty(place_), place_.parity ^ 1);
    store_scales(cells, layer.k, layer.k_scales(), shared_.key_scales(place_));
    store_scales(cells, layer.v, layer.v_scales(), shared_.value_scales(place_));
    with_codec(layer.k.codec, [&](auto codec) {
      convert_side<codec.value, true>(cells, layer.k, layer.k_scales(), shared_.keys(place_));
    });
    announce(shared_.keys_full(place_));
    mbarrier_wait(shared_.values_empty(place_), place_.parity ^ 1);
    with_codec(layer.v.codec, [&](auto codec) {
      convert_side<codec.value, false>(cells + layer.v_codes(), layer.v,
                                       layer.v_scales() - layer.v_codes(), shared_.values(place_));
    });
    announce(shared_.values_full(place_));
  }

  DENDRITE_DEVICE void announce(SharedAddress barrier) const {
    publish_to_async();
    sync_warp();
    if (lane() == 0) mbarrier_arrive(barrier);
  }

  // The scale of each slot of the tile; 0 where there is no token, whatever lies there.
  DENDRITE_DEVICE void store_scales(SharedAddress cells, const PackedVector& side, int scales_at,
                                    SharedAddress to) const {
    for (int i = thread(); i < kSlots; i += kThreads) {
      const WorkEntry entry = work_entry(
          load_shared_16(shared_.entries(place_.tile) + i / kUnit * int(sizeof(WorkEntry))));
      const char* scale = pointer(cells + i / kUnit * p_.cell_bytes + scales_at) +
                          i % kUnit * side.scales;
      store_shared_float(to + 4 * i, i % kUnit < entry.len ? operand_scale<T>(side.codec, scale) : 0.f);
    }
  }

  // Into panels as warpgroup products want them (see wgmma.cuh): keys one behind the other, values by
  // entry.
  template <int kCodec, bool kKeys>
  DENDRITE_DEVICE void convert_side(SharedAddress codes, const PackedVector& side, int scales_at,
                                    SharedAddress to) const {
    constexpr int kSteps = kSlots * kChunks / kThreads;
    constexpr int kBatch = kDim == 128 && kGroups == 1 ? 1 : 2;  // more does not fit into registers
    const int chunk = thread() % kChunks, first = thread() / kChunks;
    const int part = chunk / 8 * (kKeys ? Shared::kKeyPanelBytes : kUnit * 128);
#pragma unroll 1
    for (int step = 0; step < kSteps; step += kBatch) {
      Packed<T, 8> numbers[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int row = first + (step + i) * (kThreads / kChunks);
        const char* cell = pointer(codes + row / kUnit * p_.cell_bytes);
        const int r = row % kUnit;
        numbers[i] = decode8<T, kCodec>(cell + r * side.row, cell + scales_at + r * side.scales,
                                        chunk, kDim);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int row = first + (step + i) * (kThreads / kChunks);
        const int at = kKeys ? row * 128 : row / kUnit * (kDim / 64) * kUnit * 128 + row % kUnit * 128;
        store_shared_16(to + part + at + ((chunk ^ row) & 7) * 16,
                        make_uint4(numbers[i].words[0], numbers[i].words[1], numbers[i].words[2],
                                   numbers[i].words[3]));
      }
    }
  }

  const TreeAttentionPackedParams& p_;
  const Shared& shared_;
  Place place_;
};

// As tree_attention_tma_kernel, from packed pages.
template <class T, int kDim, int kGroups>
__global__ void __launch_bounds__(128 * (kGroups + 1), kGroups == 1 ? 2 : 1)
tree_attention_packed_tma_kernel(const __grid_constant__ TreeAttentionPackedParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shared = AttentionSharedPacked<kDim, kGroups>;
  constexpr int kConsumers = 128 * kGroups;
  // Registers of a converting and of a computing thread; without spills in either.
  constexpr int kRest = kDim == 64 ? 64 : kGroups == 1 ? 72 : 88;
  constexpr int kMost = kDim == 64 ? (kGroups == 1 ? 192 : 216) : kGroups == 1 ? 184 : 208;
  static_assert(kRegistersSuffice<kGroups, kRest, kMost>);
  DENDRITE_SHARED_MEMORY(char, memory);
  const Shared shared{kept((shared_address(memory) + 1023) / 1024 * 1024)};
  grid_dependency_launch();
  WorkSegment segment = whole_segment(p, blockIdx.x);
  if (threadIdx.x == kConsumers) {
    shared.start_cell_barriers();
    shared.start_barriers();
  }
  sync_block();
  if (threadIdx.x >= kConsumers) {
    give_registers<kRest>();
    segment = whole_segment(p, blockIdx.x);  // again: kept so far, it would be spilled
    if (segment.count > 0) AttentionConverter<T, kDim, kGroups>(p, shared).run(segment);
  } else {
    take_registers<kMost>();
    AttentionConsumer<T, kDim, kGroups, Shared>(p, shared).run_all(segment);
  }
#else
  __trap();  // built without sm_90a: better no result than a wrong one
#endif
}

}  // namespace dendrite
