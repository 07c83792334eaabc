// One file for each head_dim instantiates its kernels: they compile side by side.
#pragma once

#include "dendrite/tree_attention.cuh"
#include "dendrite/tree_attention_f32.cuh"
#ifndef DENDRITE_EMULATE
#include "dendrite/tree_attention_tma.cuh"
#endif
#include "tree_attention_merge.h"

namespace dendrite {

struct AttentionKernel {
  void (*attend)(TreeAttentionParams);
  MergeKernel merge;
  int threads, shared_bytes;
#ifndef DENDRITE_EMULATE
  // Instead of `attend`: takes maps of the keys and of the values too.
  void (*attend_maps)(TreeAttentionParams, CUtensorMap, CUtensorMap) = nullptr;
#endif
};

template <int kDim>
AttentionKernel attention_kernel(const TreeAttentionShape& shape);

extern template AttentionKernel attention_kernel<64>(const TreeAttentionShape&);
extern template AttentionKernel attention_kernel<96>(const TreeAttentionShape&);
extern template AttentionKernel attention_kernel<128>(const TreeAttentionShape&);
extern template AttentionKernel attention_kernel<256>(const TreeAttentionShape&);

template <class T, int kDim, int kWarps>
AttentionKernel tensor_core_kernel() {
  constexpr int kTile = kDim <= 128 ? kTileUnits : kTileUnits / 2;
  return {tree_attention_kernel<T, kDim, kWarps, kTile, PageReader>,
          merge_partials_kernel<T, 16 * kWarps, kDim>, kWarps * 32,
          AttentionShared<kDim, kTile>::kBytes};
}

#ifndef DENDRITE_EMULATE
template <class T, int kDim, int kGroups>
AttentionKernel hopper_kernel() {
  return {nullptr, merge_partials_kernel<T, 64 * kGroups, kDim>, 128 * (kGroups + 1),
          AttentionSharedTma<kDim, kGroups>::kBytes, tree_attention_tma_kernel<T, kDim, kGroups>};
}
#endif

template <class T, int kDim>
AttentionKernel tensor_core_kernel(int q_tile) {
#ifndef DENDRITE_EMULATE
  if constexpr (kDim == 64 || kDim == 128) {
    if (has_warpgroup_products())
      return q_tile == 128 ? hopper_kernel<T, kDim, 2>() : hopper_kernel<T, kDim, 1>();
  }
#endif
  if constexpr (kDim <= 128) {
    if (q_tile == 128) return tensor_core_kernel<T, kDim, 8>();
  }
  return tensor_core_kernel<T, kDim, 4>();
}

template <int kDim>
AttentionKernel attention_kernel(const TreeAttentionShape& shape) {
  switch (shape.dtype) {
    case Dtype::kF16: return tensor_core_kernel<half_t, kDim>(shape.q_tile);
    case Dtype::kBF16: return tensor_core_kernel<bf16, kDim>(shape.q_tile);
    case Dtype::kF32: break;
  }
  return {tree_attention_f32_kernel<kDim, PageReaderF32>, merge_partials_kernel<float, 64, kDim>,
          128, AttentionSharedF32<kDim>::kBytes};
}

}  // namespace dendrite
