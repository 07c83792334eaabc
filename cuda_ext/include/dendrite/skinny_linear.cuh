// out = x weight^T for up to 16 rows, at the speed at which the weight can be read.
//
// A block owns a range of columns of out and its 8 warps the 8 slices of the inputs. Every lane
// copies the weights and the x that it will multiply into a ring of its own in shared memory
// (cp.async), so the loop has no barrier: only the end of a round of columns has, where the slices
// are added. The ring runs on across rounds. Before the kernel ahead has ended the whole ring of
// weights is asked for, and weight rows behind it into L2: a chain of small kernels reads weights
// without a gap. So weights may not be written by a kernel right ahead of this one.
#pragma once

#include "skinny_linear_common.cuh"

namespace dendrite {

// Tiles whose sums lie in shared memory at a time; two blocks shall fit into a multiprocessor.
DENDRITE_HOST_DEVICE constexpr int skinny_sum_tiles(int tiles, int groups) { return groups == 1 ? tiles : 1; }
// Floats between rows of the sums of a warp: lanes (g, t) of a store hit 32 banks.
DENDRITE_HOST_DEVICE constexpr int skinny_sum_stride(int sum_tiles) { return sum_tiles * 16 + 4; }

// Bytes of shared memory of skinny_linear_kernel.
DENDRITE_HOST_DEVICE constexpr int skinny_stage_bytes(int tiles, int rows) { return tiles * 1024 + rows * 64; }
DENDRITE_HOST_DEVICE constexpr int skinny_shared_bytes(int tiles, int groups, int depth, int rows) {
  const int sums = rows * skinny_sum_stride(skinny_sum_tiles(tiles, groups)) * int(sizeof(float));
  return kSkinnyWarps * (depth * skinny_stage_bytes(tiles, rows) + sums);
}

// The weights of a lane, a chunk of its warp's slice at a time, round after round.
template <class T, int kTiles, bool kGated>
class SkinnyWeights {
 public:
  DENDRITE_DEVICE SkinnyWeights(const SkinnyParams& p, int first_column, int begin, int end)
      : p_(p), begin_(begin), end_(end), chunk_(begin), g_(int(threadIdx.x) % 32 / 4),
        input_(int(threadIdx.x) % 4 * 8), left_(p.columns - first_column),
        row_(static_cast<const T*>(p.weight) + int64_t(first_column + g_) * p.inputs + input_) {}

  DENDRITE_DEVICE void copy(char* to) const {
    const T* at = row_ + chunk_ * kSkinnyChunk;
    const bool inside = chunk_ * kSkinnyChunk + input_ < p_.inputs;
    const int columns = min(p_.plan.tile, left_);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool there = inside && Tile::column(tile, half, g_) < columns;
        const T* from = at + int64_t(Tile::row(tile, half, p_.columns)) * p_.inputs;
        cp_async_16_line(to + (tile * 2 + half) * 512, there ? from : p_.weight, there ? 16 : 0);
      }
  }
  DENDRITE_DEVICE int chunk() const { return chunk_; }
  DENDRITE_DEVICE void advance() {
    if (++chunk_ < end_) return;
    chunk_ = begin_;
    left_ -= p_.plan.tile;
    row_ += int64_t(p_.plan.tile) * p_.inputs;
  }

 private:
  using Tile = SkinnyTile<kGated>;
  const SkinnyParams& p_;
  int begin_, end_, chunk_, g_, input_;
  int left_;  // columns from the first of this round to the last of out
  const T* row_;
};

// Adds the slices of kTiles tiles and writes the columns [first, first + columns) of out.
template <class T, class Out, int kTiles, bool kGated>
DENDRITE_DEVICE void skinny_store(const SkinnyParams& p, const float* sums, int first,
                                  int columns) {
  constexpr int kStride = skinny_sum_stride(kTiles);
  constexpr int kColumns = kTiles * SkinnyTile<kGated>::kColumns;
  const auto total = [&](int row, int at) {
    float s[kSkinnySlices];
#pragma unroll
    for (int i = 0; i < kSkinnySlices; ++i) s[i] = sums[(i * p.rows + row) * kStride + at];
    return ((s[0] + s[1]) + (s[2] + s[3])) + (s[4] + s[5]) + (s[6] + s[7]);
  };
  for (int i = int(threadIdx.x); i < p.rows * kColumns; i += kSkinnyThreads) {
    const int row = i / kColumns, c = i % kColumns;
    if (c >= columns) continue;
    float value;
    if constexpr (kGated) {
      const int at = c / 8 * 16 + c % 8;
      value = skinny_gate<T>(total(row, at), total(row, at + 8));
    } else {
      value = skinny_finish<T>(total(row, c), p.bias, first + c);
    }
    skinny_put<Out>(p, row, first + c, value);
  }
}

// One lane's part of a stage: weights of 16 * kTiles rows, x of 8 * kGroups rows.
template <int kTiles, int kGroups>
struct SkinnyFragments {
  uint4 w[kTiles][2];
  uint4 x[kGroups];

  DENDRITE_DEVICE void load(const char* stage, int g, int rows) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) w[tile][half] = load_16(stage + (tile * 2 + half) * 512);
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
      x[group] = group * 8 + g < rows ? load_16(stage + (kTiles * 2 + group) * 512)
                                      : make_uint4(0, 0, 0, 0);
  }
};

// rows <= 8 * kGroups; p.plan.tile <= kTiles * SkinnyTile::kColumns; kDepth stages in the ring.
template <class T, class Out, int kTiles, int kGroups, int kDepth, bool kGated>
DENDRITE_KERNEL __launch_bounds__(kSkinnyThreads, 2) skinny_linear_kernel(SkinnyParams p) {
  using Tile = SkinnyTile<kGated>;
  DENDRITE_SHARED_MEMORY(char, smem);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  const int chunks = (p.inputs + kSkinnyChunk - 1) / kSkinnyChunk;
  const int begin = min(skinny_slice_begin(p.inputs, warp), chunks);
  const int end = min(skinny_slice_begin(p.inputs, warp + 1), chunks);
  const int first_column = int(blockIdx.x) * p.plan.tile * p.plan.rounds;
  const int rounds = min(p.plan.rounds, (p.columns - first_column + p.plan.tile - 1) / p.plan.tile);
  const int steps = rounds * (end - begin);
  const int stage_bytes = skinny_stage_bytes(kTiles, p.rows);
  char* const ring = smem + warp * kDepth * stage_bytes + lane * 16;
  char* const ring_end = ring + kDepth * stage_bytes;
  float* const sums = reinterpret_cast<float*>(smem + kSkinnyWarps * kDepth * stage_bytes);

  SkinnyWeights<T, kTiles, kGated> weights(p, first_column, begin, end);
#pragma unroll
  for (int i = 0; i < kDepth; ++i) {
    if (i < steps) {
      weights.copy(ring + i * stage_bytes);
      weights.advance();
    }
    cp_async_commit();
  }
  // The rows of the first round are in the ring, or a good part of each is.
  const bool ring_has_round = chunks <= kDepth * kSkinnyWarps;
  skinny_prefetch<T, kGated>(p, first_column + (ring_has_round ? p.plan.tile : 0),
                             min(first_column + rounds * p.plan.tile, p.columns), 0, p.inputs);
  grid_dependency_launch();
  grid_dependency_wait();

  // The x of the stages under way, by ordinary loads: in the order of the copies it would be known
  // to be there only after all of them.
  const T* const x = static_cast<const T*>(p.x) + int64_t(g) * p.inputs + t * 8;
  const auto x_inside = [&](int chunk, int group) {
    return group * 8 + g < p.rows && chunk * kSkinnyChunk + t * 8 < p.inputs;
  };
  const auto x_at = [&](int chunk, int group) {
    return x + int64_t(group) * 8 * p.inputs + chunk * kSkinnyChunk;
  };
  {
    uint4 held[kDepth][kGroups];
    int chunk = begin;
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
#pragma unroll
      for (int group = 0; group < kGroups; ++group)
        held[i][group] = i < steps && x_inside(chunk, group) ? load_16(x_at(chunk, group))
                                                             : make_uint4(0, 0, 0, 0);
      if (++chunk >= end) chunk = begin;
    }
#pragma unroll
    for (int i = 0; i < kDepth; ++i)
#pragma unroll
      for (int group = 0; group < kGroups; ++group)
        if (group * 8 + g < p.rows)
          store_16(ring + i * stage_bytes + (kTiles * 2 + group) * 512, held[i][group]);
  }

  int asked = kDepth;  // stages copied so far
  char* slot = ring;
  SkinnyFragments<kTiles, kGroups> now, next;
  cp_async_wait<kDepth - 1>();
  now.load(slot, g, p.rows);
  for (int round = 0; round < rounds; ++round) {
    float acc[kTiles][kGroups][4] = {};
    for (int chunk = begin; chunk < end; ++chunk) {
      char* const next_slot = slot + stage_bytes == ring_end ? ring : slot + stage_bytes;
      cp_async_wait<kDepth - 2>();
      next.load(next_slot, g, p.rows);
      skinny_multiply<T>(acc, now.w, now.x);
      if (asked < steps) {
        weights.copy(slot);
#pragma unroll
        for (int group = 0; group < kGroups; ++group)
          if (group * 8 + g < p.rows)
            cp_async_16(slot + (kTiles * 2 + group) * 512,
                        x_inside(weights.chunk(), group) ? x_at(weights.chunk(), group) : p.x,
                        x_inside(weights.chunk(), group) ? 16 : 0);
        weights.advance();
        ++asked;
      }
      cp_async_commit();
      slot = next_slot;
      now = next;
    }
    constexpr int kSumTiles = skinny_sum_tiles(kTiles, kGroups);
    constexpr int kStride = skinny_sum_stride(kSumTiles);
#pragma unroll
    for (int tile = 0; tile < kTiles; tile += kSumTiles) {
      if (round > 0 || tile > 0) sync_block();  // the sums before these have been read
#pragma unroll
      for (int i = 0; i < kSumTiles * kGroups * 4; ++i) {
        const int own = i / (kGroups * 4), group = i / 4 % kGroups, half = i / 2 % 2;
        const int row = group * 8 + t * 2 + i % 2;
        if (row < p.rows)
          sums[(warp * p.rows + row) * kStride + own * 16 + half * 8 + g] =
              acc[tile + own][group][i % 4];
      }
      sync_block();
      const int skipped = round * p.plan.tile + tile * Tile::kColumns;
      const int here = min((round + 1) * p.plan.tile, p.columns - first_column) - skipped;
      skinny_store<T, Out, kSumTiles, kGated>(p, sums, first_column + skipped, here);
    }
  }
}

}  // namespace dendrite
