// Tree attention over a work list; see tree_attention.cuh and attention_work.h.
#pragma once

#include "dtype.h"

namespace dendrite {

struct TreeAttentionParams;

struct TreeAttentionShape {
  Dtype dtype;
  int head_dim;  // 64, 96, 128 or 256
  int q_tile;    // queries of a block: 64, or 128 (not in fp32, not with head_dim 256)
};

// Whether there is a kernel for this shape.
bool tree_attention_takes(const TreeAttentionShape& shape);

// Workers for each kv head that fill the current device; at least 1.
int tree_attention_workers(const TreeAttentionShape& shape, int kv_heads);

// Two launches: the work list, then the merge of partial results. `workers` is what the list was
// cut for.
void launch_tree_attention(const TreeAttentionParams& params, const TreeAttentionShape& shape,
                           int rows, int workers, cudaStream_t stream);

}  // namespace dendrite
