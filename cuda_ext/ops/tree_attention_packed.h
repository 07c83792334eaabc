// Tree attention over packed pages; see tree_attention_packed.cuh.
#pragma once

#include "tree_attention.h"

namespace dendrite {

struct TreeAttentionPackedParams;

// As tree_attention_workers; the same shapes are taken.
int tree_attention_packed_workers(const TreeAttentionShape& shape, int kv_heads);

// Three launches at most: the work list, the merge of partial results, and with `v_signs` ([kv_heads,
// head_dim] of the rotation of values) the way back out of their basis.
void launch_tree_attention_packed(const TreeAttentionPackedParams& params,
                                  const TreeAttentionShape& shape, const float* v_signs, int rows,
                                  int workers, cudaStream_t stream);

}  // namespace dendrite
