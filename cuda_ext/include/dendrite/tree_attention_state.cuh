// What tree attention keeps per query row, how two states are folded into one, and where partial
// states lie in memory. Shared by the tensor-core and the fp32 kernel.
//
//   state: m = running maximum of the scores in log2 units, l = sum of exp2(score - m),
//          o = sum of exp2(score - m) * value
//   partial (slot, kv head, i): o at partials[((slot * kv_heads + head) * q_tile + i) * head_dim],
//          then, behind all o, (m, l) at the same index times 2
#pragma once

#include "tree_attention_params.h"
#include "attention_work.h"
#include "device.cuh"

namespace dendrite {

constexpr float kMinusInf = -__builtin_huge_valf();

// Weights that bring two maxima to their common one.
DENDRITE_DEVICE float fold_weights(float m_a, float m_b, float& w_a, float& w_b) {
  const float m = fmaxf(m_a, m_b);
  w_a = m_a == kMinusInf ? 0.f : exp2_fast(m_a - m);
  w_b = m_b == kMinusInf ? 0.f : exp2_fast(m_b - m);
  return m;
}

// a * w_a + b * w_b, rounded the same way wherever it is written.
DENDRITE_DEVICE float fold(float a, float w_a, float b, float w_b) {
  return fmaf(b, w_b, a * w_a);
}

DENDRITE_DEVICE float normalised(float o, float l) { return l == 0.f ? 0.f : o / l; }

template <int kQTile, int kDim>
struct PartialView {
  float* o;
  float* ml;
  DENDRITE_DEVICE PartialView(const TreeAttentionParams& p, int slot, int head) {
    const size_t row = (size_t(slot) * p.kv_heads + head) * kQTile;
    o = p.partials + row * kDim;
    ml = p.partials + size_t(p.max_slots) * p.kv_heads * kQTile * kDim + row * 2;
  }
};

DENDRITE_DEVICE WorkSegment read_segment(const TreeAttentionParams& p, int index) {
  return reinterpret_cast<const WorkSegment*>(p.work + p.segments_at)[index];
}

DENDRITE_DEVICE int first_reader(const WorkEntry& entry) { return int(entry.rows & (kOld - 1)); }
DENDRITE_DEVICE int end_of_readers(const WorkEntry& entry) { return int(entry.rows >> 16); }

// Element of q or out where query i of the rows from `row_begin` on starts.
DENDRITE_DEVICE size_t query_offset(const TreeAttentionParams& p, int row_begin, int i, int head,
                                    int dim) {
  const int row = i / p.group;
  return (size_t(row_begin + row) * p.heads + head * p.group + (i - row * p.group)) * dim;
}

// Element of k_pages or v_pages where an entry starts; its slots are one contiguous piece.
DENDRITE_DEVICE size_t entry_offset(const TreeAttentionParams& p, const WorkEntry& entry, int head,
                                    int dim) {
  const int page = entry.slot >> p.page_shift;
  const int offset = entry.slot - (page << p.page_shift);
  return (((size_t(page) * p.kv_heads + head) << p.page_shift) + offset) * dim;
}

// Second launch: merges the partial results of rows whose block has more than one segment.
//
// A block of threads takes (row, kv head, part of the values) after (row, kv head, part); a thread
// owns four values. All weights come from the largest maximum of a row, then its slots are added in
// order. A row that a segment did not touch has m = -inf there and no o. The work list is there
// before the first kernel of a step begins, so reading it waits for nobody. The values of kAhead
// slots are on their way at once: many where rows are few, for little time, and fewer where rows are
// many, for more blocks.
template <class T, int kQTile, int kDim, int kAhead>
class PartialMerger {
 public:
  // Values [at, at + 4) of the row's [group, kDim] of one kv head.
  DENDRITE_DEVICE PartialMerger(const TreeAttentionParams& p, const WorkBlock& block, int row,
                                int head, int at)
      : partial_(p, block.first_slot, head), step_(size_t(p.kv_heads) * kQTile),
        slots_(block.num_slots), query_((row - block.row_begin) * p.group + at / kDim),
        value_(at % kDim) {}

  DENDRITE_DEVICE float4 run() {
    load(0);
    float m = kMinusInf;
    for (int first = 0; first < slots_; first += kAhead) {
      float2 ml[kAhead];
      load_ml(first, ml);
#pragma unroll
      for (int s = 0; s < kAhead; ++s) m = fmaxf(m, ml[s].x);
    }
    float l = 0.f;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int first = 0; first < slots_; first += kAhead) {
      if (first > 0) load(first);
      float2 ml[kAhead];
      load_ml(first, ml);
#pragma unroll
      for (int s = 0; s < kAhead; ++s) {
        if (ml[s].x == kMinusInf) continue;
        const float weight = exp2_fast(ml[s].x - m);
        l = fmaf(weight, ml[s].y, l);
        sum.x = fmaf(weight, part_[s].x, sum.x);
        sum.y = fmaf(weight, part_[s].y, sum.y);
        sum.z = fmaf(weight, part_[s].z, sum.z);
        sum.w = fmaf(weight, part_[s].w, sum.w);
      }
    }
    return make_float4(normalised(sum.x, l), normalised(sum.y, l), normalised(sum.z, l),
                       normalised(sum.w, l));
  }

 private:
  DENDRITE_DEVICE void load_ml(int first, float2 (&ml)[kAhead]) const {
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      ml[s] = make_float2(kMinusInf, 0.f);
      if (first + s >= slots_) continue;
      ml[s] = *reinterpret_cast<const float2*>(partial_.ml + 2 * ((first + s) * step_ + query_));
    }
  }
  DENDRITE_DEVICE void load(int first) {
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      part_[s] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (first + s >= slots_) continue;
      const size_t query = (first + s) * step_ + query_;
      part_[s] = *reinterpret_cast<const float4*>(partial_.o + query * kDim + value_);
    }
  }

  const PartialView<kQTile, kDim> partial_;
  const size_t step_;  // from slot to slot
  const int slots_, query_, value_;
  float4 part_[kAhead];
};

template <class T, int kQTile, int kDim, int kAhead>
DENDRITE_KERNEL merge_partials_kernel(TreeAttentionParams p, int rows, int parts) {
  grid_dependency_launch();
  const bool none = p.work[0] == 0;
  grid_dependency_wait();
  if (none) return;
  const auto* blocks = reinterpret_cast<const WorkBlock*>(p.work + kWorkHeader);
  for (int unit = blockIdx.x; unit < rows * p.kv_heads * parts; unit += gridDim.x) {
    const int row = unit / parts / p.kv_heads, head = unit / parts % p.kv_heads;
    const int at = (unit % parts * blockDim.x + threadIdx.x) * 4;  // in [group, kDim]
    const WorkBlock block = blocks[row / p.rows_per_block];
    if (block.num_slots == 0 || row >= block.row_begin + block.num_rows) continue;  // padding too
    if (at >= p.group * kDim) continue;
    const float4 result = PartialMerger<T, kQTile, kDim, kAhead>(p, block, row, head, at).run();
    T* out = static_cast<T*>(p.out) + (size_t(row) * p.heads + head * p.group) * kDim + at;
    out[0] = from_float<T>(result.x);
    out[1] = from_float<T>(result.y);
    out[2] = from_float<T>(result.z);
    out[3] = from_float<T>(result.w);
  }
}

}  // namespace dendrite
