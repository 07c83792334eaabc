#include <algorithm>

#include "tree_attention_instances.h"

namespace dendrite {
namespace {

constexpr int kMergeThreads = 128;

AttentionKernel find(const TreeAttentionShape& shape) {
  switch (shape.head_dim) {
    case 64: return attention_kernel<64>(shape);
    case 96: return attention_kernel<96>(shape);
    case 128: return attention_kernel<128>(shape);
    default: return attention_kernel<256>(shape);
  }
}

}  // namespace

bool tree_attention_takes(const TreeAttentionShape& shape) {
  const int d = shape.head_dim;
  if (d != 64 && d != 96 && d != 128 && d != 256) return false;
  if (shape.q_tile == 64) return true;
  return shape.q_tile == 128 && shape.dtype != Dtype::kF32 && d <= 128;
}

int tree_attention_workers(const TreeAttentionShape& shape, int kv_heads) {
  const AttentionKernel kernel = find(shape);
  const int blocks = max_blocks_per_multiprocessor(kernel.attend, kernel.threads,
                                                   kernel.shared_bytes);
  return std::max(1, num_multiprocessors() * blocks / kv_heads);
}

void launch_tree_attention(const TreeAttentionParams& params, const TreeAttentionShape& shape,
                           int rows, int workers, cudaStream_t stream) {
  const AttentionKernel kernel = find(shape);
  launch_kernel(kernel.attend, dim3(workers, params.kv_heads), dim3(kernel.threads),
                kernel.shared_bytes, stream, true, params);
  const int values = params.group * shape.head_dim / 4;
  launch_kernel(kernel.merge, dim3(rows, params.kv_heads, (values + kMergeThreads - 1) / kMergeThreads),
                dim3(kMergeThreads), 0, stream, true, params);
}

}  // namespace dendrite
