// Second launch of tree attention: merges the partial results of rows whose block has more than one
// segment.
//
// A warp takes query after query; a lane owns four values of every 128. Lane s has the weight of slot
// s, which comes from the largest maximum of the row; slots are added in their order. The code is
// short, since a launch that runs so little of it waits for its instructions rather than for data.
#pragma once

#include "tree_attention_state.cuh"

namespace dendrite {

template <class T, int kQTile, int kDim>
class PartialMerger {
  static constexpr int kPieces = (kDim + 127) / 128;  // four values each
  static constexpr int kAhead = 16 / kPieces;         // slots on their way

 public:
  DENDRITE_DEVICE PartialMerger(const TreeAttentionParams& p, int head) : p_(p), head_(head) {}

  // A query of the list's blocks, or none.
  DENDRITE_DEVICE void seek(int unit) {
    const uint4 block = load_16(p_.work + kWorkHeader + 4 * (unit / kQTile));
    block_ = {int32_t(block.x), int32_t(block.y), int32_t(block.z), int32_t(block.w)};
    i_ = unit % kQTile;
  }

  DENDRITE_DEVICE void merge() {
    if (i_ >= block_.num_rows * p_.group || block_.num_slots == 0) return;
    const PartialView<kQTile, kDim> partial(p_, block_.first_slot, head_);
    from_ = partial.o + size_t(i_) * kDim + lane() * 4;
    ml_ = reinterpret_cast<const float2*>(partial.ml) + i_;
    float2 mine = maximum_and_sum(lane());
#pragma unroll
    for (int s = 0; s < kAhead; ++s) load(s, s);
    float m = mine.x;
#pragma unroll 1
    for (int s = lane() + 32; s < block_.num_slots; s += 32) m = fmaxf(m, maximum_and_sum(s).x);
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) m = fmaxf(m, shfl_xor(m, mask));
    l_ = 0.f;
#pragma unroll
    for (int k = 0; k < kPieces; ++k) sum_[k] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
    for (int base = 0; base < block_.num_slots; base += 32) {
      if (base > 0) mine = maximum_and_sum(base + lane());
      const float weight = mine.x == kMinusInf ? 0.f : exp2_fast(mine.x - m);
      add(base, weight, weight * mine.y);
    }
    write();
  }

 private:
  static DENDRITE_DEVICE int lane() { return threadIdx.x % kWarpSize; }
  static DENDRITE_DEVICE bool has(int piece) {
    return kDim % 128 == 0 || piece * 128 + lane() * 4 < kDim;
  }

  DENDRITE_DEVICE float2 maximum_and_sum(int slot) const {
    if (slot >= block_.num_slots) return make_float2(kMinusInf, 0.f);
    return ml_[slot * size_t(p_.kv_heads) * kQTile];
  }

  // Slots are loaded in turn; `j` is slot % kAhead.
  DENDRITE_DEVICE void load(int slot, int j) {
    if (slot >= block_.num_slots) return;
#pragma unroll
    for (int k = 0; k < kPieces; ++k)
      if (has(k)) part_[j][k] = *reinterpret_cast<const float4*>(from_ + k * 128);
    from_ += size_t(p_.kv_heads) * kQTile * kDim;
  }

  // Up to 32 slots; lane s has weight and weighted sum of slot base + s.
  DENDRITE_DEVICE void add(int base, float weight, float weighted_sum) {
    const int count = min(32, block_.num_slots - base);
#pragma unroll 1
    for (int first = 0; first < count; first += kAhead) {
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (first + j >= count) break;
        const float w = shfl(weight, first + j);
        l_ += shfl(weighted_sum, first + j);
#pragma unroll
        for (int k = 0; k < kPieces; ++k) {
          if (w == 0.f) continue;  // there may be no o
          sum_[k].x = fmaf(w, part_[j][k].x, sum_[k].x);
          sum_[k].y = fmaf(w, part_[j][k].y, sum_[k].y);
          sum_[k].z = fmaf(w, part_[j][k].z, sum_[k].z);
          sum_[k].w = fmaf(w, part_[j][k].w, sum_[k].w);
        }
        load(base + first + j + kAhead, j);
      }
    }
  }

  DENDRITE_DEVICE void write() const {
    const float scale = inverse(l_);
    T* out = static_cast<T*>(p_.out) + query_offset(p_, block_.row_begin, i_, head_, kDim);
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      if (!has(k)) continue;
      const int at = k * 128 + lane() * 4;
      const float4 o = sum_[k];
      if constexpr (sizeof(T) == 4) {
        *reinterpret_cast<float4*>(out + at) =
            make_float4(o.x * scale, o.y * scale, o.z * scale, o.w * scale);
      } else {
        auto* to = reinterpret_cast<uint32_t*>(out + at / 16 * 16 + at % 16 / 2);
        to[0] = pack2<T>(o.x * scale, o.y * scale);
        to[4] = pack2<T>(o.z * scale, o.w * scale);
      }
    }
  }

  const TreeAttentionParams& p_;
  const int head_;
  WorkBlock block_;
  int i_;
  const float* from_;
  const float2* ml_;
  float l_;
  float4 sum_[kPieces], part_[kAhead][kPieces];
};

// The work list is there before the first kernel of a step begins, so reading it waits for nobody.
template <class T, int kQTile, int kDim>
DENDRITE_KERNEL merge_partials_kernel(TreeAttentionParams p, int queries) {
  grid_dependency_launch();
  const int warps = blockDim.x / kWarpSize;
  PartialMerger<T, kQTile, kDim> merger(p, blockIdx.y);
  int unit = blockIdx.x * warps + shfl(threadIdx.x / kWarpSize, 0);
  const bool none = p.work[0] == 0;
  merger.seek(unit);
  grid_dependency_wait();
  if (none) return;
  while (true) {
    merger.merge();
    unit += gridDim.x * warps;
    if (unit >= queries) return;
    merger.seek(unit);
  }
}

}  // namespace dendrite
