// What tree attention keeps per query row and where partial states lie in memory.
//
//   state: m = a maximum of the scores in log2 units, l = sum of exp2(score - m),
//          o = sum of exp2(score - m) * value
//   partial (slot, kv head, i): o at partials[((slot * kv_heads + head) * q_tile + i) * head_dim],
//          then, behind all o, (m, l) at the same index times 2. A row that a segment did not touch
//          has m = -inf and no o. 16-bit kernels leave o in the order of their fragments: values
//          16 k + 2 t + {0, 1, 8, 9} of a row lie at 16 k + 4 t.
#pragma once

#include "tree_attention_params.h"
#include "attention_work.h"
#include "device.cuh"

namespace dendrite {

constexpr float kMinusInf = -__builtin_huge_valf();

// What sums of weights are multiplied with; 0 for a row that saw nothing.
DENDRITE_DEVICE float inverse(float l) { return l == 0.f ? 0.f : 1.f / l; }

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

// Row of query i of a tile: i / group.
DENDRITE_DEVICE int row_of(const TreeAttentionParams& p, int i) {
  return i * p.group_inverse >> kGroupInverseShift;
}

// Element of q or out where query i of the rows from `row_begin` on starts.
DENDRITE_DEVICE size_t query_offset(const TreeAttentionParams& p, int row_begin, int i, int head,
                                    int dim) {
  const int row = row_of(p, i);
  return (size_t(row_begin + row) * p.heads + head * p.group + (i - row * p.group)) * dim;
}

// Element of k_pages or v_pages where an entry starts; its slots are one contiguous piece.
DENDRITE_DEVICE size_t entry_offset(const TreeAttentionParams& p, const WorkEntry& entry, int head,
                                    int dim) {
  const int page = entry.slot >> p.page_shift;
  const int offset = entry.slot - (page << p.page_shift);
  return (((size_t(page) * p.kv_heads + head) << p.page_shift) + offset) * dim;
}

}  // namespace dendrite
