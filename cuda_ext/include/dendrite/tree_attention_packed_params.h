// Arguments of tree attention over packed pages; k_pages and v_pages are not used.
#pragma once

#include "packed_layer.h"
#include "tree_attention_params.h"

namespace dendrite {

struct TreeAttentionPackedParams : TreeAttentionParams {
  PackedLayer layer;
};

}  // namespace dendrite
