// Arguments of tree attention over packed pages; k_pages and v_pages are not used.
#pragma once

#include "packed_layer.h"
#include "tree_attention_params.h"

namespace dendrite {

struct TreeAttentionPackedParams : TreeAttentionParams {
  PackedLayer layer;
  // For the kernel that has bulk copies: bytes of a cell, and tiles of cells that a block holds.
  int32_t cell_bytes, cell_tiles;
};

}  // namespace dendrite
