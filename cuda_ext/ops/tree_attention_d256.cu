#include "tree_attention_instances.h"

namespace dendrite {
template AttentionKernel attention_kernel<256>(const TreeAttentionShape&);
}  // namespace dendrite
