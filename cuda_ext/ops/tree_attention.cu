#include "tree_attention_instances.h"
#ifndef DENDRITE_EMULATE
#include "tree_attention_maps.h"
#endif

namespace dendrite {
namespace {

AttentionKernel find(const TreeAttentionShape& shape) {
  switch (shape.head_dim) {
    case 64: return attention_kernel<64>(shape);
    case 96: return attention_kernel<96>(shape);
    case 128: return attention_kernel<128>(shape);
    default: return attention_kernel<256>(shape);
  }
}

int max_blocks(const AttentionKernel& kernel) {
#ifndef DENDRITE_EMULATE
  if (kernel.attend_maps != nullptr)
    return max_blocks_per_multiprocessor(kernel.attend_maps, kernel.threads, kernel.shared_bytes);
#endif
  return max_blocks_per_multiprocessor(kernel.attend, kernel.threads, kernel.shared_bytes);
}

void launch_attend(const AttentionKernel& kernel, const TreeAttentionParams& params,
                   [[maybe_unused]] const TreeAttentionShape& shape, dim3 grid, cudaStream_t stream) {
#ifndef DENDRITE_EMULATE
  if (kernel.attend_maps != nullptr) {
    const int64_t rows = int64_t{params.pages} * params.kv_heads << params.page_shift;
    const int panels = shape.head_dim / 64;
    launch_kernel(kernel.attend_maps, grid, dim3(kernel.threads), kernel.shared_bytes, stream, true,
                  params, map_of_panels(params.k_pages, rows, panels, kUnit, 1),
                  map_of_panels(params.v_pages, rows, panels, kUnit, panels));
    return;
  }
#endif
  launch_kernel(kernel.attend, grid, dim3(kernel.threads), kernel.shared_bytes, stream, true,
                params);
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
  return std::max(1, num_multiprocessors() * max_blocks(kernel) / kv_heads);
}

void launch_tree_attention(const TreeAttentionParams& params, const TreeAttentionShape& shape,
                           int rows, int workers, cudaStream_t stream) {
  const AttentionKernel kernel = find(shape);
  launch_attend(kernel, params, shape, dim3(workers, params.kv_heads), stream);
  launch_merge(kernel.merge, params, shape, rows, stream);
}

}  // namespace dendrite
