// Tree attention over packed pages that few queries read: each warp is a worker of its own.
//
// Pages come to shared memory as codes, by cp.async into a ring of the warp. A lane turns codes into
// operands of mma.m16n8k16 in registers: keys and values stand on the left, where a product has room
// for 16 slots or values of which none is wasted, and queries on the right, 8 at a time. Which of the
// 16 places of a product's k or m a value takes does not matter as long as both sides agree, so a
// lane takes what lies together in memory:
//
//   scores   [16 slots, 8 queries] += K [16 slots, 16 values] x Q^T; lane (g, t) has the values
//            [t * D / 4, (t + 1) * D / 4) of slots g and g + 8, and of query g
//   output   [16 values, 8 queries] += V^T [16 values, 16 slots] x weights; lane (g, t) has the values
//            [g * D / 8, (g + 1) * D / 8) of slots 2 t, 2 t + 1, 2 t + 8 and 2 t + 9, and of the
//            output for queries 2 t and 2 t + 1
//
// with g = lane / 4 and t = lane % 4. Entries are taken two at a time. Softmax is that of
// tree_attention_rows.cuh for such a pair; how entries are paired depends on the rows beside a row, and
// with it the last bits of its result.
#pragma once

#include "tree_attention_few_ring.cuh"
#include "tree_attention_few_rows.cuh"
#include "tree_attention_packed.cuh"

namespace dendrite {

// 8-bit numbers are multiplied as fp16, into which they go with the least work; all others as T. What
// weights are multiplied with has to fit then: E4M3 values up to 7,168 do, larger ones make the row NaN.
template <class T, int kCodec>
using FewOperand = std::conditional_t<is_plain_fp8(kCodec), half_t, T>;
// Whether E4M3 is converted as it is; its numbers are over 2^kHalfShift otherwise.
template <int kCodec>
constexpr bool kWholeNumbers = kCodec == kE4m3 && kConvertsE4m3;

// `Cells`: CopiedCells, or BulkCells of tree_attention_few_bulk.cuh.
template <class T, int kDim, int kTiles, class Cells>
class FewQueriesWarp {
  static constexpr int kKeyChunks = kDim / 32;    // of 8 values, of a slot's keys in a lane
  static constexpr int kValueChunks = kDim / 64;  // of its values
  using Rows = FewQueriesRows<T, kDim, kTiles>;
  using Scores = typename Rows::Scores;

 public:
  DENDRITE_DEVICE FewQueriesWarp(const TreeAttentionPackedParams& p, char* ring)
      : p_(p), rows_(p), cells_(ring, p.cell_bytes, p.cell_tiles),
        pages_(p.layer.data + p.layer.at + int64_t(head()) * p.cell_bytes) {}

  // Takes one segment; returns the worker's next one, or -1.
  DENDRITE_DEVICE int run(int index) {
    const WorkSegment segment = read_segment(p_, index);
    if (segment.count == 0) return -1;
    count_ = segment.count;
    entries_ = segment.entries;
    rows_.start(segment, is_plain_fp8(p_.layer.k.codec));
    slots_ = slots_from(lane());
    next_slots_ = slots_from(32 + lane());
    for (int i = 0; i < p_.cell_tiles; ++i) load(2 * i, next_place(i));
    for (int i = 0; i < count_; i += 2) {
      cells_.wait(place_, parity_);
      attend(cells_.at(place_));
      sync_warp();
      load(i + 2 * p_.cell_tiles, place_);
      if (++place_ == p_.cell_tiles) {
        place_ = 0;
        parity_ ^= 1;
      }
    }
    cp_async_wait<0>();
    // Weights had the scales of numbers over 2^kHalfShift.
    const bool whole = kWholeNumbers<kE4m3> && p_.layer.v.codec == kE4m3;
    rows_.finish(segment, whole ? 1.f / (1 << kHalfShift) : 1.f);
    return segment.next;
  }

 private:
  static DENDRITE_DEVICE int lane() { return threadIdx.x % 32; }
  static DENDRITE_DEVICE int g() { return lane() / 4; }
  static DENDRITE_DEVICE int t() { return lane() % 4; }
  static DENDRITE_DEVICE int head() { return blockIdx.y; }
  DENDRITE_DEVICE int slots_from(int index) const {
    return index < count_ ? p_.work[entries_ + 4 * index] : 0;
  }

  // The place behind the next one by i.
  DENDRITE_DEVICE int next_place(int i) const {
    const int place = place_ + i;
    return place < p_.cell_tiles ? place : place - p_.cell_tiles;
  }

  DENDRITE_DEVICE const char* cell(int slot) const {
    const int page = slot >> p_.page_shift;
    const int unit = (slot - (page << p_.page_shift)) / kCellSlots;
    return pages_ + page * p_.layer.page_bytes + unit * (p_.kv_heads * p_.cell_bytes);
  }

  // Entries i, which is even, and i + 1 of the segment with their cells into a place of the ring. Behind
  // the last one there is padding.
  DENDRITE_DEVICE void load(int i, int place) {
    const bool wanted = i < count_;
    if (wanted && i % 32 == 0 && i > 0) {
      slots_ = next_slots_;
      next_slots_ = slots_from(i + 32 + lane());
    }
    const int first = shfl(slots_, i % 32), second = shfl(slots_, i % 32 + 1);
    cells_.load(place, p_.work + entries_ + 4 * i, cell(first), cell(second), wanted);
  }

  DENDRITE_DEVICE void attend(const char* place) {
    const auto* entries = reinterpret_cast<const WorkEntry*>(place);
    const char* const cells[2] = {place + kCellsAt, place + kCellsAt + p_.cell_bytes};
    const PackedLayer& layer = p_.layer;
    Scores s[2], w[2];
    with_codec(layer.k.codec, [&](auto codec) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        scores<codec.value>(cells[j], s[j]);
        scale_scores<codec.value>(cells[j] + layer.k_scales(), s[j]);
      }
    });
    rows_.mask(entries[0], s[0]);
    rows_.mask(entries[1], s[1]);
    rows_.weigh(s, w);
    with_codec(layer.v.codec, [&](auto codec) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const char* scales = cells[j] + layer.v_scales();
        uint32_t b[kTiles][2];
        pack<codec.value>(scales, w[j], b);
        accumulate<codec.value>(cells[j] + layer.v_codes(), scales, b);
      }
    });
  }

  // Raw scores, without scales.
  template <int kCodec>
  DENDRITE_DEVICE void scores(const char* cell, Scores& s) const {
    using Number = FewOperand<T, kCodec>;
    constexpr bool kWhole = kWholeNumbers<kCodec>;
    constexpr int kPiece = kCodecBits[kCodec] <= 8 ? kKeyChunks : 1;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) s[tile][0] = s[tile][1] = s[tile][2] = s[tile][3] = 0.f;
    const PackedVector& side = p_.layer.k;
    const char* low = cell + g() * side.row;
    const char* high = low + 8 * side.row;
    const char* exponents = cell + p_.layer.k_scales() + g() * side.scales;
#pragma unroll
    for (int first = 0; first < kKeyChunks; first += kPiece) {
      const int index = (t() * kKeyChunks + first) / kPiece;
      const CodePiece<kCodec, kPiece> a(low, index, kDim), b(high, index, kDim);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) {
        const int chunk = t() * kKeyChunks + first + i;
        const auto x =
            a.template numbers<Number, kWhole>(i, block_exponent<kCodec>(exponents, chunk));
        const auto y = b.template numbers<Number, kWhole>(
            i, block_exponent<kCodec>(exponents + 8 * side.scales, chunk));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t keys[4] = {x.words[2 * half], y.words[2 * half], x.words[2 * half + 1],
                                    y.words[2 * half + 1]};
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            const int at = 4 * (first + i) + 2 * half;
            const uint32_t queries[2] = {rows_.q[tile][at], rows_.q[tile][at + 1]};
            mma_m16n8k16<Number>(s[tile], keys, queries);
          }
        }
      }
    }
  }

  // The scale of slot g + 8 * half, for numbers that are not whole; `scales` those of the cell.
  template <int kCodec>
  static DENDRITE_DEVICE float slot_scale(const char* scales, int half) {
    constexpr int kBytes = kScaleBytes[kCodec];
    return operand_scale<FewOperand<T, kCodec>>(kCodec, scales + (g() + 8 * half) * kBytes);
  }

  // Into log2 units.
  template <int kCodec>
  DENDRITE_DEVICE void scale_scores(const char* scales, Scores& s) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      constexpr float kUnit = kWholeNumbers<kCodec> ? 1.f / (1 << kHalfShift) : 1.f;
      const float factor = rows_.score_unit() * kUnit * slot_scale<kCodec>(scales, half);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        s[tile][2 * half] *= factor;
        s[tile][2 * half + 1] *= factor;
      }
    }
  }

  // Weights times the scales of the values, as right operands.
  template <int kCodec>
  DENDRITE_DEVICE void pack(const char* scales, const Scores& w, uint32_t (&b)[kTiles][2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float factor = slot_scale<kCodec>(scales, half);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
        b[tile][half] = transpose_8x8(
            pack2<FewOperand<T, kCodec>>(w[tile][2 * half] * factor, w[tile][2 * half + 1] * factor));
    }
  }

  template <int kCodec>
  DENDRITE_DEVICE void accumulate(const char* codes, const char* scales,
                                  const uint32_t (&b)[kTiles][2]) {
    constexpr int kPiece = kCodecBits[kCodec] <= 8 ? kValueChunks : 1;
    using Piece = CodePiece<kCodec, kPiece>;
    using Number = FewOperand<T, kCodec>;
    const PackedVector& side = p_.layer.v;
    const char* rows = codes + 2 * t() * side.row;
    const char* exponents = scales + 2 * t() * side.scales;
#pragma unroll
    for (int first = 0; first < kValueChunks; first += kPiece) {
      const int index = (g() * kValueChunks + first) / kPiece;
      const Piece pieces[4] = {
          Piece(rows, index, kDim), Piece(rows + side.row, index, kDim),
          Piece(rows + 8 * side.row, index, kDim), Piece(rows + 9 * side.row, index, kDim)};
#pragma unroll
      for (int i = 0; i < kPiece; ++i) {
        const int chunk = g() * kValueChunks + first + i;
        Packed<Number, 8> x[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const char* exponent = exponents + (r / 2 * 8 + r % 2) * side.scales;
          x[r] = pieces[r].template numbers<Number, kWholeNumbers<kCodec>>(
              i, block_exponent<kCodec>(exponent, chunk));
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t a[4] = {byte_perm(x[0].words[j], x[1].words[j], 0x5410),
                                 byte_perm(x[0].words[j], x[1].words[j], 0x7632),
                                 byte_perm(x[2].words[j], x[3].words[j], 0x5410),
                                 byte_perm(x[2].words[j], x[3].words[j], 0x7632)};
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile)
            mma_m16n8k16<Number>(rows_.o[tile][4 * (first + i) + j], a, b[tile]);
        }
      }
    }
  }

  const TreeAttentionPackedParams& p_;
  Rows rows_;
  const Cells cells_;
  const char* const pages_;  // the head's first cell of page 0
  int place_ = 0, parity_ = 0;  // of the ring; how often it was gone round
  int count_, entries_;
  int slots_, next_slots_;  // of 32 entries each, a lane one; see load()
};

template <class T, int kDim, int kTiles, class Cells>
DENDRITE_KERNEL __launch_bounds__(kFewWarps * 32, Cells::blocks(kDim, kTiles))
tree_attention_few_kernel(TreeAttentionPackedParams p, int workers) {
  if constexpr (Cells::kHere) {
    DENDRITE_SHARED_MEMORY(char, smem);
    grid_dependency_launch();
    grid_dependency_wait();
    const int warp = shfl(threadIdx.x / kWarpSize, 0);
    FewQueriesWarp<T, kDim, kTiles, Cells> few(
        p, smem + warp * p.cell_tiles * few_stride(p.cell_bytes));
    const int first = blockIdx.x * kFewWarps + warp;
    for (int index = first < workers ? first : -1; index >= 0;) index = few.run(index);
  } else {
    Cells::stop();
  }
}

}  // namespace dendrite
