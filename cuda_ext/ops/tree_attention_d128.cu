#include "tree_attention_instances.h"

namespace dendrite {
template AttentionKernel attention_kernel<128>(const TreeAttentionShape&);
}  // namespace dendrite
