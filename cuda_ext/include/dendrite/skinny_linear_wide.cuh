// out = x weight^T for 17 to 64 rows. Here x is as large as what a block reads of the weight, so a
// block of many columns shares it: its warps own 16 weight rows each and all inputs of the block,
// and x goes through shared memory once for all of them. Weights are in a ring of every lane's own
// as in the narrow kernel, with a barrier for each block of 64 inputs because of x.
//
// Sums are those of the narrow kernel, bit by bit: a warp finishes a slice, begins the next from
// zero, and adds them in the same order. With p.plan.splits > 1 blocks share the inputs too and
// leave sums of pairs of slices in p.partials, which skinny_linear_finish_kernel adds.
#pragma once

#include "skinny_linear_common.cuh"

namespace dendrite {

// Bytes of shared memory of skinny_linear_wide_kernel.
DENDRITE_HOST_DEVICE constexpr int skinny_wide_stage_bytes(int groups) { return (kSkinnyWarps * 2 + groups) * 1024; }
DENDRITE_HOST_DEVICE constexpr int skinny_wide_shared_bytes(int groups, int depth) {
  return depth * skinny_wide_stage_bytes(groups);
}

// Where a block and its lanes work, and the copies of a stage: weights and x of one block of inputs.
template <class T, int kGroups, bool kGated>
class SkinnyWideStages {
 public:
  DENDRITE_DEVICE SkinnyWideStages(const SkinnyParams& p, int first_column, int begin, int end)
      : p_(p), begin_(begin), end_(end), block_(begin), g_(int(threadIdx.x) % 32 / 4),
        input_(int(threadIdx.x) % 4 * 8),
        warp_columns_((p.plan.tile + kSkinnyWarps - 1) / kSkinnyWarps),
        column_(int(threadIdx.x) / 32 * warp_columns_), first_(first_column),
        left_(p.columns - first_column) {}

  // The column of out of row g + 8 * half of this warp's tile, or -1.
  DENDRITE_DEVICE int column(int half) const { return column(half, g_); }
  DENDRITE_DEVICE int column(int half, int g) const {
    const int own = Tile::column(0, half, g);
    const bool there = own < warp_columns_ && column_ + own < min(p_.plan.tile, left_);
    return there ? first_ + column_ + own : -1;
  }
  DENDRITE_DEVICE void copy_weights(char* stage) const {
    char* const to = stage + int(threadIdx.x) / 32 * 2048 + int(threadIdx.x) % 32 * 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int c = column(half);
      const int64_t row = c + (kGated && half == 1 ? p_.columns : 0);
#pragma unroll
      for (int chunk = 0; chunk < 2; ++chunk) {
        const int input = block_ * kSkinnyBlock + chunk * kSkinnyChunk + input_;
        const bool there = c >= 0 && input < p_.inputs;
        cp_async_16_line(to + (chunk * 2 + half) * 512,
                         static_cast<const T*>(p_.weight) + (there ? row * p_.inputs + input : 0),
                         there ? 16 : 0);
      }
    }
  }
  // Pieces of 16 bytes of x lie as lanes read them: [chunk][group of 8 rows][row][4 pieces].
  static constexpr int kPieces = kGroups * 64 / kSkinnyThreads;  // of a thread in a stage
  DENDRITE_DEVICE const T* x_piece(int i, int block, int* valid_bytes) const {
    const int piece = int(threadIdx.x) + i * kSkinnyThreads;
    const int row = piece / 32 % kGroups * 8 + piece / 4 % 8;
    const int input =
        block * kSkinnyBlock + piece / (32 * kGroups) * kSkinnyChunk + piece % 4 * 8;
    const bool there = row < p_.rows && input < p_.inputs;
    *valid_bytes = there ? 16 : 0;
    return static_cast<const T*>(p_.x) + (there ? int64_t(row) * p_.inputs + input : 0);
  }
  DENDRITE_DEVICE static char* x_slot(char* stage, int i) {
    return stage + kSkinnyWarps * 2048 + (int(threadIdx.x) + i * kSkinnyThreads) * 16;
  }
  DENDRITE_DEVICE void copy_x(char* stage) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      int bytes;
      const T* from = x_piece(i, block_, &bytes);
      cp_async_16(x_slot(stage, i), from, bytes);
    }
  }
  DENDRITE_DEVICE int block() const { return block_; }
  DENDRITE_DEVICE void advance() {
    if (++block_ == end_) next_round();
  }
  DENDRITE_DEVICE void next_round() {
    block_ = begin_;
    first_ += p_.plan.tile;
    left_ -= p_.plan.tile;
  }

 private:
  using Tile = SkinnyTile<kGated>;
  static_assert(kGroups * 64 % kSkinnyThreads == 0);
  const SkinnyParams& p_;
  int begin_, end_, block_, g_, input_, warp_columns_;
  int column_;       // the warp's first, in the tile
  int first_, left_;  // the round's first column, and columns from there to the last of out
};

// Adds what a lane holds of its 16 weight rows in the order of skinny_linear_params.h.
template <int kGroups>
struct SkinnySums {
  float slice[1][kGroups][4], pair[kGroups][4], total[kGroups][4];

  DENDRITE_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kGroups * 4; ++i) slice[0][i / 4][i % 4] = 0.0f;
  }
  // Ends slice number `number`, of which `first` was the block's first; begins the next.
  DENDRITE_DEVICE void end_slice(int number, int first) {
#pragma unroll
    for (int i = 0; i < kGroups * 4; ++i) {
      float& p = pair[i / 4][i % 4];
      float& all = total[i / 4][i % 4];
      const float s = slice[0][i / 4][i % 4];
      p = number % 2 == 0 ? s : p + s;
      if (number % 2 == 1) all = number - first == 1 ? p : all + p;
    }
    clear();
  }
};

// rows <= 8 * kGroups; p.plan.tile <= kSkinnyWarps * SkinnyTile::kColumns; blockIdx.y is the part
// of the inputs.
template <class T, class Out, int kGroups, int kDepth, bool kGated, bool kSplit>
DENDRITE_KERNEL __launch_bounds__(kSkinnyThreads, 1) skinny_linear_wide_kernel(SkinnyParams p) {
  DENDRITE_SHARED_MEMORY(char, smem);
  constexpr int kStage = skinny_wide_stage_bytes(kGroups);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, t = lane % 4;
  const int slices = kSkinnySlices / p.plan.splits;
  const int first_slice = int(blockIdx.y) * slices;
  const auto slice_begin = [&](int slice) {
    return skinny_slice_begin(p.inputs, slice) / (kSkinnyBlock / kSkinnyChunk);
  };
  const int begin = slice_begin(first_slice), end = slice_begin(first_slice + slices);
  const int first_column = int(blockIdx.x) * p.plan.tile * p.plan.rounds;
  const int rounds = min(p.plan.rounds, (p.columns - first_column + p.plan.tile - 1) / p.plan.tile);
  const int steps = rounds * (end - begin);

  SkinnyWideStages<T, kGroups, kGated> stages(p, first_column, begin, end);
  SkinnyWideStages<T, kGroups, kGated> here = stages;  // the round being computed
#pragma unroll
  for (int i = 0; i < kDepth - 1; ++i) {
    if (i < steps) {
      stages.copy_weights(smem + i * kStage);
      stages.advance();
    }
    cp_async_commit();
  }
  skinny_prefetch<T, kGated>(p, first_column, min(first_column + rounds * p.plan.tile, p.columns),
                             begin * kSkinnyBlock, min(end * kSkinnyBlock, p.inputs));
  grid_dependency_launch();
  grid_dependency_wait();
  {
    int block = begin;
#pragma unroll
    for (int i = 0; i < kDepth - 1; ++i) {
#pragma unroll
      for (int piece = 0; piece < stages.kPieces; ++piece) {
        int bytes;
        const T* from = stages.x_piece(piece, block, &bytes);
        store_16(stages.x_slot(smem + i * kStage, piece),
                 bytes != 0 && i < steps ? load_16(from) : make_uint4(0, 0, 0, 0));
      }
      if (++block >= end) block = begin;
    }
  }

  int step = 0, slot = 0;
  SkinnySums<kGroups> sums;
  for (int round = 0; round < rounds; ++round, here.next_round()) {
    sums.clear();
    int slice = first_slice;
    // Ends the slices that end before `block`, also those without inputs.
    const auto end_slices = [&](int block) {
      for (; slice < first_slice + slices && slice_begin(slice + 1) <= block; ++slice) {
        sums.end_slice(slice, first_slice);
        if constexpr (kSplit) {
          if (slice % 2 == 0) continue;
          const int weight_rows = kGated ? 2 * p.columns : p.columns;
#pragma unroll
          for (int group = 0; group < kGroups; ++group)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int row = group * 8 + t * 2 + i % 2, column = here.column(i / 2);
              if (row < p.rows && column >= 0)
                p.partials[(int64_t(slice / 2) * p.rows + row) * weight_rows + column +
                           (kGated && i / 2 == 1 ? p.columns : 0)] = sums.pair[group][i];
            }
        }
      }
    };
    for (int block = begin; block < end; ++block, ++step) {
      end_slices(block);
      cp_async_wait<kDepth - 2>();
      sync_block();  // x is there, and all warps have done with the stage before this one
      const int free_slot = slot == 0 ? kDepth - 1 : slot - 1;
      if (step + kDepth - 1 < steps) {
        stages.copy_weights(smem + free_slot * kStage);
        stages.copy_x(smem + free_slot * kStage);
        stages.advance();
      }
      cp_async_commit();
      const char* const own = smem + slot * kStage + warp * 2048 + lane * 16;
      const char* const shared = smem + slot * kStage + kSkinnyWarps * 2048 + lane * 16;
#pragma unroll
      for (int chunk = 0; chunk < 2; ++chunk) {
        const uint4 w[1][2] = {{load_16(own + chunk * 1024), load_16(own + chunk * 1024 + 512)}};
        uint4 x[kGroups];
#pragma unroll
        for (int group = 0; group < kGroups; ++group)
          x[group] = load_16(shared + (chunk * kGroups + group) * 512);
        skinny_multiply<T>(sums.slice, w, x);
      }
      slot = slot + 1 == kDepth ? 0 : slot + 1;
    }
    end_slices(end);
    if constexpr (!kSplit) {
#pragma unroll
      for (int group = 0; group < kGroups; ++group)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = group * 8 + t * 2 + i % 2, column = here.column(i / 2);
          if (row >= p.rows || column < 0) continue;
          const float sum = sums.total[group][i];
          if constexpr (kGated) {
            if (i < 2)
              skinny_put<Out>(p, row, column, skinny_gate<T>(sum, sums.total[group][i + 2]));
          } else {
            skinny_put<Out>(p, row, column, skinny_finish<T>(sum, p.bias, column));
          }
        }
    }
  }
}

// Adds the four sums of pairs of slices of every element.
template <class T, class Out, bool kGated>
DENDRITE_KERNEL __launch_bounds__(kSkinnyThreads) skinny_linear_finish_kernel(SkinnyParams p) {
  grid_dependency_launch();
  grid_dependency_wait();
  const int column = int(blockIdx.x) * kSkinnyThreads + int(threadIdx.x), row = int(blockIdx.y);
  if (column >= p.columns) return;
  const int weight_rows = kGated ? 2 * p.columns : p.columns;
  const auto total = [&](int weight_row) {
    float pairs[kSkinnyPairs];
#pragma unroll
    for (int i = 0; i < kSkinnyPairs; ++i)
      pairs[i] = p.partials[(int64_t(i) * p.rows + row) * weight_rows + weight_row];
    return pairs[0] + pairs[1] + pairs[2] + pairs[3];
  };
  if constexpr (kGated)
    skinny_put<Out>(p, row, column, skinny_gate<T>(total(column), total(column + p.columns)));
  else
    skinny_put<Out>(p, row, column, skinny_finish<T>(total(column), p.bias, column));
}

}  // namespace dendrite
