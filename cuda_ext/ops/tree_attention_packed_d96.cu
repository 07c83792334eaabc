#include "tree_attention_packed_instances.h"

namespace dendrite {
template PackedAttentionKernel packed_attention_kernel<96>(const TreeAttentionShape&, int);
}  // namespace dendrite
