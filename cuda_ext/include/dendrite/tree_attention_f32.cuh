// Tree attention in fp32 without tensor cores: the same work list, states and merge as
// tree_attention.cuh, for models that run in fp32. One entry is loaded at a time; a warp owns 16
// queries and takes them one by one, its lanes spread over slots for the scores and over dimensions
// for the values.
#pragma once

#include "tree_attention_state.cuh"
#include "vectors.cuh"

namespace dendrite {

template <int kDim>
struct AttentionSharedF32 {
  static constexpr int kQueries = 64;
  static constexpr int kStride = kDim + 4;
  static constexpr int kQAt = 0;
  static constexpr int kOAt = kQAt + kQueries * kDim * 4;
  static constexpr int kKAt = kOAt + kQueries * kDim * 4;
  static constexpr int kVAt = kKAt + kUnit * kStride * 4;
  static constexpr int kStateAt = kVAt + kUnit * kStride * 4;  // m, l, position of each query
  static constexpr int kBytes = kStateAt + 3 * kQueries * 4;
};

// Loads values of unquantised pages.
template <int kDim>
struct PageReaderF32 {
  using Params = TreeAttentionParams;
  const Params& p;

  // Eight values of slot r of an entry.
  DENDRITE_DEVICE void load(const WorkEntry& entry, int head, int r, int chunk, float (&k)[8],
                            float (&v)[8]) const {
    const size_t from = entry_offset(p, entry, head, kDim) + r * kDim + chunk * 8;
    load_floats<8>(k, static_cast<const float*>(p.k_pages) + from);
    load_floats<8>(v, static_cast<const float*>(p.v_pages) + from);
  }
};

template <int kDim, class Reader>
class AttentionBlockF32 {
  using Shared = AttentionSharedF32<kDim>;
  static constexpr int kQueries = Shared::kQueries;
  static constexpr int kThreads = 128;

 public:
  DENDRITE_DEVICE AttentionBlockF32(const typename Reader::Params& p, char* smem)
      : p_(p), reader_{p}, head_(blockIdx.y), lane_(threadIdx.x % 32), warp_(threadIdx.x / 32) {
    q_ = reinterpret_cast<float*>(smem + Shared::kQAt);
    o_ = reinterpret_cast<float*>(smem + Shared::kOAt);
    k_ = reinterpret_cast<float*>(smem + Shared::kKAt);
    v_ = reinterpret_cast<float*>(smem + Shared::kVAt);
    m_ = reinterpret_cast<float*>(smem + Shared::kStateAt);
    l_ = m_ + kQueries;
    position_ = reinterpret_cast<int*>(l_ + kQueries);
  }

  // Takes one segment; returns the worker's next one, or -1.
  DENDRITE_DEVICE int run(int index) {
    const WorkSegment segment = read_segment(p_, index);
    if (segment.count == 0) return -1;
    row_begin_ = segment.row_begin;
    num_queries_ = segment.num_rows * p_.group;
    start();
    const auto* entries = reinterpret_cast<const WorkEntry*>(p_.work + segment.entries);
    for (int e = 0; e < segment.count; ++e) {
      const WorkEntry entry = entries[e];
      if (entry.len == 0) continue;
      sync_block();
      load(entry);
      sync_block();
      const int begin = first_reader(entry) * p_.group;
      const int end = min(end_of_readers(entry) * p_.group, num_queries_);
      for (int i = max(begin, warp_ * 16); i < min(end, warp_ * 16 + 16); ++i) attend(entry, i);
    }
    sync_block();
    finish(segment);
    return segment.next;
  }

 private:
  DENDRITE_DEVICE void start() {
    for (int at = threadIdx.x; at < kQueries * kDim; at += kThreads) {
      const int i = at / kDim, d = at % kDim;
      const bool valid = i < num_queries_;
      q_[at] = valid ? static_cast<const float*>(p_.q)[query_offset(p_, row_begin_, i, head_, kDim) + d]
                     : 0.f;
      o_[at] = 0.f;
    }
    for (int i = threadIdx.x; i < kQueries; i += kThreads) {
      m_[i] = kMinusInf;
      l_[i] = 0.f;
      position_[i] = i < num_queries_ ? p_.positions[row_begin_ + row_of(p_, i)] : -1;
    }
  }

  DENDRITE_DEVICE void load(const WorkEntry& entry) {
    for (int at = threadIdx.x; at < kUnit * kDim / 8; at += kThreads) {
      const int r = at / (kDim / 8), chunk = at % (kDim / 8);
      float k[8] = {}, v[8] = {};
      if (r < entry.len) reader_.load(entry, head_, r, chunk, k, v);
      store_floats<8>(k_ + r * Shared::kStride + chunk * 8, k);
      store_floats<8>(v_ + r * Shared::kStride + chunk * 8, v);
    }
  }

  DENDRITE_DEVICE void attend(const WorkEntry& entry, int i) {
    const int slot = lane_ % 16, half = lane_ / 16;
    float s = 0.f;
    for (int d = half; d < kDim / 4; d += 2) {
      const float4 q = *reinterpret_cast<const float4*>(q_ + i * kDim + d * 4);
      const float4 k = *reinterpret_cast<const float4*>(k_ + slot * Shared::kStride + d * 4);
      s += (q.x * k.x + q.y * k.y) + (q.z * k.z + q.w * k.w);
    }
    s = (s + shfl_xor(s, 16)) * p_.scale_log2;
    const int at = entry.pos + slot, reader = position_[i];
    if (slot >= entry.len || at > reader || (p_.window > 0 && at <= reader - p_.window))
      s = kMinusInf;
    float top = s;
    for (int mask = 1; mask < 16; mask *= 2) top = fmaxf(top, shfl_xor(top, mask));
    const float old = m_[i];
    const float m = fmaxf(old, top);
    const float safe = m == kMinusInf ? 0.f : m;
    const float keep = old == kMinusInf ? 0.f : exp2f(old - safe);
    const float weight = exp2f(s - safe);
    float sum = weight;
    for (int mask = 1; mask < 16; mask *= 2) sum += shfl_xor(sum, mask);
    for (int d = lane_; d < kDim; d += 32) {
      float o = o_[i * kDim + d] * keep;
      for (int j = 0; j < kUnit; ++j) o += shfl(weight, j) * v_[j * Shared::kStride + d];
      o_[i * kDim + d] = o;
    }
    sync_warp();
    if (lane_ == 0) {
      m_[i] = m;
      l_[i] = l_[i] * keep + sum;
    }
    sync_warp();
  }

  DENDRITE_DEVICE void finish(const WorkSegment& segment) {
    for (int at = threadIdx.x; at < num_queries_ * kDim; at += kThreads) {
      const int i = at / kDim, d = at % kDim;
      if (segment.slot < 0) {
        float* out = static_cast<float*>(p_.out) + query_offset(p_, row_begin_, i, head_, kDim);
        out[d] = o_[at] * inverse(l_[i]);
      } else {
        PartialView<kQueries, kDim>(p_, segment.slot, head_).o[segment.first_query * kDim + at] = o_[at];
      }
    }
    for (int i = threadIdx.x; segment.slot >= 0 && i < num_queries_; i += kThreads) {
      float* ml =
          PartialView<kQueries, kDim>(p_, segment.slot, head_).ml + 2 * (segment.first_query + i);
      ml[0] = m_[i];
      ml[1] = l_[i];
    }
    sync_block();  // the next segment overwrites o, m and l
  }

  const TreeAttentionParams& p_;
  const Reader reader_;
  const int head_, lane_, warp_;
  float *q_, *o_, *k_, *v_, *m_, *l_;
  int* position_;
  int row_begin_, num_queries_;
};

// `Reader`: PageReaderF32, or PackedReaderF32.
template <int kDim, template <int> class Reader>
DENDRITE_KERNEL tree_attention_f32_kernel(typename Reader<kDim>::Params p) {
  DENDRITE_SHARED_MEMORY(char, smem);
  grid_dependency_launch();
  grid_dependency_wait();
  AttentionBlockF32<kDim, Reader<kDim>> block(p, smem);
  for (int index = blockIdx.x; index >= 0;) index = block.run(index);
}

}  // namespace dendrite
