#include "tree_attention_instances.h"

namespace dendrite {
template AttentionKernel attention_kernel<96>(const TreeAttentionShape&);
}  // namespace dendrite
