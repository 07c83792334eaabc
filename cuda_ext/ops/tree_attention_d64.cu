#include "tree_attention_instances.h"

namespace dendrite {
template AttentionKernel attention_kernel<64>(const TreeAttentionShape&);
}  // namespace dendrite
