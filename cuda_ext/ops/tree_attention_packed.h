// Tree attention over packed pages; see tree_attention_packed.cuh.
#pragma once

#include "tree_attention.h"

namespace dendrite {

struct TreeAttentionPackedParams;

// Whether there is a kernel for this shape: where there is one for unquantised pages, and for tiles
// of 8 or 16 queries (tree_attention_few.cuh) of 64 or 128 values in 16 bits.
bool tree_attention_packed_takes(const TreeAttentionShape& shape);

// Whether it holds cells of so many bytes.
bool tree_attention_packed_holds(const TreeAttentionShape& shape, int cell_bytes);

// As tree_attention_workers; 0 where it does not.
int tree_attention_packed_workers(const TreeAttentionShape& shape, int kv_heads, int cell_bytes);

// Three launches at most: the work list, the merge of partial results, and with `v_signs` ([kv_heads,
// head_dim] of the rotation of values) the way back out of their basis.
void launch_tree_attention_packed(const TreeAttentionPackedParams& params,
                                  const TreeAttentionShape& shape, const float* v_signs, int rows,
                                  int workers, cudaStream_t stream);

}  // namespace dendrite
