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

// Second launch: merges the partial results of rows whose block has more than one segment, in slot
// order. blockIdx = (row, kv head, part of the values); a thread owns four values. A row that a
// segment did not touch has m = -inf there and no o. The work list is there before the first kernel
// of a step begins, so reading it waits for nobody. The values of kAhead slots are on their way at
// once: many where rows are few, for little time, and fewer where rows are many, for more blocks.
template <class T, int kQTile, int kDim, int kAhead>
DENDRITE_KERNEL merge_partials_kernel(TreeAttentionParams p) {
  grid_dependency_launch();
  const int row = blockIdx.x, head = blockIdx.y;
  const WorkBlock block =
      reinterpret_cast<const WorkBlock*>(p.work + kWorkHeader)[row / p.rows_per_block];
  const int at = (blockIdx.z * blockDim.x + threadIdx.x) * 4;  // in [group, kDim]
  const int i = (row - block.row_begin) * p.group + at / kDim;
  grid_dependency_wait();
  if (block.num_slots == 0 || row >= block.row_begin + block.num_rows) return;  // padding too
  if (at >= p.group * kDim) return;
  const PartialView<kQTile, kDim> partial(p, block.first_slot, head);
  const size_t step = size_t(p.kv_heads) * kQTile;  // from slot to slot
  float m = kMinusInf, l = 0.f, o[4] = {0.f, 0.f, 0.f, 0.f};
  for (int first = 0; first < block.num_slots; first += kAhead) {
    float2 ml[kAhead];
    float4 part[kAhead];
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      ml[s] = make_float2(kMinusInf, 0.f);
      part[s] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (first + s >= block.num_slots) continue;
      const size_t query = (first + s) * step + i;
      ml[s] = *reinterpret_cast<const float2*>(partial.ml + 2 * query);
      part[s] = *reinterpret_cast<const float4*>(partial.o + query * kDim + at % kDim);
    }
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (ml[s].x == kMinusInf) continue;
      float w, w_s;
      m = fold_weights(m, ml[s].x, w, w_s);
      l = fold(l, w, ml[s].y, w_s);
      o[0] = fold(o[0], w, part[s].x, w_s);
      o[1] = fold(o[1], w, part[s].y, w_s);
      o[2] = fold(o[2], w, part[s].z, w_s);
      o[3] = fold(o[3], w, part[s].w, w_s);
    }
  }
  T* out = static_cast<T*>(p.out) + (size_t(row) * p.heads + head * p.group) * kDim + at;
#pragma unroll
  for (int c = 0; c < 4; ++c) out[c] = from_float<T>(normalised(o[c], l));
}

}  // namespace dendrite
