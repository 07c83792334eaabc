// What the warps of a block share in tree attention on Hopper: stages of K and V, the entries of their
// tiles, and barriers.
#pragma once

#include "tma.cuh"
#include "tree_attention_state.cuh"
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

constexpr int entries_of_tile(int dim, int groups) { return dim == 64 && groups == 2 ? 8 : 4; }

// `kPacked`: warps of this block make the tiles out of codes, and leave the slots' scales beside them.
template <int kDim, int kGroups, int kStageCount, bool kPacked>
struct AttentionStages {
  static constexpr int kTile = entries_of_tile(kDim, kGroups);
  static constexpr int kStages = kStageCount;
  static constexpr int kRing = kStages < 8 && !kPacked ? 8 : 16;  // tiles of entries under way
  static constexpr bool kScaled = kPacked;
  static constexpr int kPanels = kDim / 64;
  static constexpr int kKeyPanelBytes = kTile * kUnit * 128;
  static constexpr int kTileBytes = kPanels * kKeyPanelBytes;  // of K, and of V
  static constexpr int kEntriesBytes = (kTile + 1) * int(sizeof(WorkEntry));  // and the summary
  static constexpr int kBarriersAt = 2 * kStages * kTileBytes;
  static constexpr int kEntriesAt = kBarriersAt + 4 * kStages * kMbarrierBytes;
  static constexpr int kScalesAt = kEntriesAt + kRing * kEntriesBytes;
  static constexpr int kScaleBytes = kTile * kUnit * 4;  // of K, and of V
  static constexpr int kEnd = kScalesAt + (kPacked ? 2 * kStages * kScaleBytes : 0);
  static constexpr int kBytes = kEnd + 1024;  // room to align

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
  DENDRITE_DEVICE explicit AttentionStages(SharedAddress base) : base(base) {}
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

  DENDRITE_DEVICE SharedAddress key_scales(const Place& at) const {
    return base + kScalesAt + at.stage * 2 * kScaleBytes;
  }
  DENDRITE_DEVICE SharedAddress value_scales(const Place& at) const {
    return key_scales(at) + kScaleBytes;
  }

  DENDRITE_DEVICE void start_barriers() const {
    for (Place at; at.tile < kStages; at.step()) {
      mbarrier_init(keys_full(at), kPacked ? 4 : 1);  // who makes them has four warps
      mbarrier_init(values_full(at), kPacked ? 4 : 1);
      mbarrier_init(keys_empty(at), 4 * kGroups);  // one arrival of each warp
      mbarrier_init(values_empty(at), 4 * kGroups);
    }
    mbarrier_init_done();
  }
};

template <int kDim, int kGroups>
using AttentionSharedTma =
    AttentionStages<kDim, kGroups,
                    entries_of_tile(kDim, kGroups) == 8 ? 6 : kDim == 128 ? 3 * kGroups : 6, false>;

// What a thread of kGroups + 1 warpgroups starts with.
template <int kGroups>
constexpr int kFirstRegisters = 65536 / (128 * (kGroups + 1) * (kGroups == 1 ? 2 : 1)) / 8 * 8;
// Whether kGroups of them can have kMost registers a thread and one kRest: what all started with has to
// do, or they wait for registers for ever.
template <int kGroups, int kRest, int kMost>
constexpr bool kRegistersSuffice = kRest + kGroups * kMost <= (kGroups + 1) * kFirstRegisters<kGroups>;

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

// A TileSummary, in all lanes that hold the tile's entries.
template <int kTile, int kGroups>
DENDRITE_DEVICE uint4 summarise(const TreeAttentionParams& p, const WorkEntry& entry,
                                const WorkSegment& segment) {
  int begin = first_reader(entry) * p.group, end = end_of_readers(entry) * p.group;
  int low = entry.pos, high = entry.len == kUnit ? entry.pos + kUnit - 1 : 0x7fffffff;
  int readers = 0;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int limit = min(64 * (g + 1), segment.num_rows * p.group);
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

}  // namespace dendrite
