// One file for each head_dim instantiates its kernels: they compile side by side.
#pragma once

#include "dendrite/tree_attention_few.cuh"
#include "dendrite/tree_attention_packed.cuh"
#include "tree_attention_merge.h"
#include "tree_attention_packed.h"
#ifndef DENDRITE_EMULATE
#include "dendrite/tree_attention_tma.cuh"

#include "dendrite/tree_attention_converter.cuh"
#include "dendrite/tree_attention_few_bulk.cuh"
#endif

namespace dendrite {

struct PackedAttentionKernel {
  void (*attend)(TreeAttentionPackedParams);
  MergeKernel merge;
  int threads, shared_bytes;
  int cell_tiles = 0;  // see TreeAttentionPackedParams
  // Instead of `attend`, where each warp is a worker: takes their number too.
  void (*attend_few)(TreeAttentionPackedParams, int) = nullptr;
};

// For cells of so many bytes; 0: as small as they get.
template <int kDim>
PackedAttentionKernel packed_attention_kernel(const TreeAttentionShape& shape, int cell_bytes);

extern template PackedAttentionKernel packed_attention_kernel<64>(const TreeAttentionShape&, int);
extern template PackedAttentionKernel packed_attention_kernel<96>(const TreeAttentionShape&, int);
extern template PackedAttentionKernel packed_attention_kernel<128>(const TreeAttentionShape&, int);
extern template PackedAttentionKernel packed_attention_kernel<256>(const TreeAttentionShape&, int);

template <class T, int kDim, int kWarps>
PackedAttentionKernel packed_tensor_core_kernel() {
  constexpr int kTile = kDim <= 128 ? kTileUnits : kTileUnits / 2;
  return {tree_attention_kernel<T, kDim, kWarps, kTile, PackedReader>,
          merge_partials_kernel<T, 16 * kWarps, kDim>, kWarps * 32,
          AttentionShared<kDim, kTile>::kBytes +
              PackedReader<T, kDim, kWarps * 32, kTile>::kSharedBytes};
}

template <class T, int kDim, int kTiles>
PackedAttentionKernel packed_few_kernel(int cell_bytes) {
  PackedAttentionKernel kernel{nullptr, merge_partials_kernel<T, 8 * kTiles, kDim>,
                               kFewWarps * kWarpSize, 0};
  kernel.attend_few = tree_attention_few_kernel<T, kDim, kTiles, CopiedCells>;
#ifndef DENDRITE_EMULATE
  if (has_warpgroup_products())
    kernel.attend_few = tree_attention_few_kernel<T, kDim, kTiles, BulkCells>;
#endif
  for (const int pairs : {kManyPairs, kLeastPairs}) {
    kernel.shared_bytes = kFewWarps * pairs * few_stride(cell_bytes);
    kernel.cell_tiles = pairs;
    if (kernel.shared_bytes <= kFewBytes) break;
  }
  return kernel;
}

#ifndef DENDRITE_EMULATE
template <class T, int kDim, int kGroups>
PackedAttentionKernel packed_hopper_kernel(int cell_tiles) {
  return {tree_attention_packed_tma_kernel<T, kDim, kGroups>,
          merge_partials_kernel<T, 64 * kGroups, kDim>, 128 * (kGroups + 1),
          AttentionSharedPacked<kDim, kGroups>::kBytes, cell_tiles};
}
#endif

template <class T, int kDim>
PackedAttentionKernel packed_tensor_core_kernel(int q_tile, int cell_bytes) {
  if constexpr (kDim == 64 || kDim == 128) {
    if (q_tile == 8) return packed_few_kernel<T, kDim, 1>(cell_bytes);
    if (q_tile == 16) return packed_few_kernel<T, kDim, 2>(cell_bytes);
  }
#ifndef DENDRITE_EMULATE
  if constexpr (kDim == 64 || kDim == 128) {
    const int tiles = q_tile == 128 ? AttentionSharedPacked<kDim, 2>::tiles_of_cells(cell_bytes)
                                    : AttentionSharedPacked<kDim, 1>::tiles_of_cells(cell_bytes);
    if (has_warpgroup_products() && tiles > 0)
      return q_tile == 128 ? packed_hopper_kernel<T, kDim, 2>(tiles)
                           : packed_hopper_kernel<T, kDim, 1>(tiles);
  }
#endif
  if constexpr (kDim <= 128) {
    if (q_tile == 128) return packed_tensor_core_kernel<T, kDim, 8>();
  }
  return packed_tensor_core_kernel<T, kDim, 4>();
}

template <int kDim>
PackedAttentionKernel packed_attention_kernel(const TreeAttentionShape& shape, int cell_bytes) {
  switch (shape.dtype) {
    case Dtype::kF16: return packed_tensor_core_kernel<half_t, kDim>(shape.q_tile, cell_bytes);
    case Dtype::kBF16: return packed_tensor_core_kernel<bf16, kDim>(shape.q_tile, cell_bytes);
    case Dtype::kF32: break;
  }
  return {tree_attention_f32_kernel<kDim, PackedReaderF32>, merge_partials_kernel<float, 64, kDim>,
          128, AttentionSharedF32<kDim>::kBytes};
}

}  // namespace dendrite
