// Arguments of tree attention over packed pages; k_pages and v_pages are not used.
#pragma once

#include "packed_layer.h"
#include "tree_attention_params.h"

namespace dendrite {

struct TreeAttentionPackedParams : TreeAttentionParams {
  PackedLayer layer;
  // For kernels that keep cells in shared memory: bytes of a cell, and how many tiles of them a block
  // holds (tree_attention_converter.cuh), or pairs of them a warp (tree_attention_few.cuh).
  int32_t cell_bytes, cell_tiles;
};

}  // namespace dendrite
