// The second launch of tree attention.
#pragma once

#include <algorithm>

#include "dendrite/tree_attention_merge.cuh"
#include "launch.h"
#include "tree_attention.h"

namespace dendrite {

constexpr int kMergeWarps = 4;
constexpr int kMergeBlocks = 8;  // of a multiprocessor

using MergeKernel = void (*)(TreeAttentionParams, int);

// A warp for each query; where there are few, over as many multiprocessors as there are.
inline void launch_merge(MergeKernel merge, const TreeAttentionParams& params,
                         const TreeAttentionShape& shape, int rows, cudaStream_t stream) {
  const int queries = int(work_blocks(rows, params.rows_per_block)) * shape.q_tile;
  const int most = kMergeBlocks * num_multiprocessors();
  const int warps = queries * params.kv_heads > most ? kMergeWarps : 1;
  const int blocks = std::min(queries / warps, std::max(1, most / params.kv_heads));
  launch_kernel(merge, dim3(blocks, params.kv_heads), dim3(warps * kWarpSize), 0, stream, true,
                params, queries);
}

}  // namespace dendrite
