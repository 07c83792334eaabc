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

DENDRITE_DEVICE WorkSegment read_segment(const int32_t* work, int index) {
  return reinterpret_cast<const WorkSegment*>(work + work[kSegments])[index];
}

DENDRITE_DEVICE WorkBlock read_block(const int32_t* work, int index) {
  return reinterpret_cast<const WorkBlock*>(work + work[kBlocks])[index];
}

// Element of q or out where query i of a block starts.
DENDRITE_DEVICE size_t query_offset(const TreeAttentionParams& p, const WorkBlock& block, int i,
                                    int head, int dim) {
  const int row = i / p.group;
  return (size_t(block.row_begin + row) * p.heads + head * p.group + (i - row * p.group)) * dim;
}

// Merges the partial results of a block in slot order; called by every thread of the block's last
// segment to finish. A row that a segment did not touch has m = -inf there and no o.
template <class T, int kQTile, int kDim>
DENDRITE_DEVICE void merge_partials(const TreeAttentionParams& p, const WorkBlock& block, int head) {
  constexpr int kLanes = kDim / 4;  // threads per query
  const int queries = block.num_rows * p.group;
  const int lane = threadIdx.x % kLanes;
  const int rows_at_once = blockDim.x / kLanes;
  if (int(threadIdx.x) >= rows_at_once * kLanes) return;
  for (int i = threadIdx.x / kLanes; i < queries; i += rows_at_once) {
    float m = kMinusInf, l = 0.f, o[4] = {0.f, 0.f, 0.f, 0.f};
    for (int s = 0; s < block.num_slots; ++s) {
      const PartialView<kQTile, kDim> partial(p, block.first_slot + s, head);
      const float m_s = partial.ml[2 * i], l_s = partial.ml[2 * i + 1];
      if (m_s == kMinusInf) continue;
      const float4 o_s = *reinterpret_cast<const float4*>(partial.o + size_t(i) * kDim + lane * 4);
      float w, w_s;
      m = fold_weights(m, m_s, w, w_s);
      l = fold(l, w, l_s, w_s);
      o[0] = fold(o[0], w, o_s.x, w_s);
      o[1] = fold(o[1], w, o_s.y, w_s);
      o[2] = fold(o[2], w, o_s.z, w_s);
      o[3] = fold(o[3], w, o_s.w, w_s);
    }
    T* out = static_cast<T*>(p.out) + query_offset(p, block, i, head, kDim) + lane * 4;
    for (int c = 0; c < 4; ++c) out[c] = from_float<T>(normalised(o[c], l));
  }
}

// True in every thread of the block whose segment is the last of its work block to finish. What
// the others wrote is visible then, and the counter is zero again. `flag` is shared memory.
DENDRITE_DEVICE bool last_to_arrive(const TreeAttentionParams& p, const WorkSegment& segment,
                                    const WorkBlock& block, int head, int* flag) {
  thread_fence();
  sync_block();
  if (threadIdx.x == 0) {
    int* counter = p.counters + segment.block * p.kv_heads + head;
    const bool last = atomic_add(counter, 1) == block.num_slots - 1;
    if (last) *counter = 0;
    *flag = last;
  }
  sync_block();
  thread_fence();
  return *flag != 0;
}

}  // namespace dendrite
