#include "packed_rows.h"
#include "tree_attention_packed_instances.h"

namespace dendrite {
namespace {

PackedAttentionKernel find(const TreeAttentionShape& shape, int cell_bytes) {
  switch (shape.head_dim) {
    case 64: return packed_attention_kernel<64>(shape, cell_bytes);
    case 96: return packed_attention_kernel<96>(shape, cell_bytes);
    case 128: return packed_attention_kernel<128>(shape, cell_bytes);
    default: return packed_attention_kernel<256>(shape, cell_bytes);
  }
}

bool is_few(const TreeAttentionShape& shape) { return shape.q_tile < 64; }

int max_blocks(const PackedAttentionKernel& kernel) {
  if (kernel.attend_few != nullptr)
    return kFewWarps *
           max_blocks_per_multiprocessor(kernel.attend_few, kernel.threads, kernel.shared_bytes);
  return max_blocks_per_multiprocessor(kernel.attend, kernel.threads, kernel.shared_bytes);
}

}  // namespace

bool tree_attention_packed_takes(const TreeAttentionShape& shape) {
  if (!is_few(shape)) return tree_attention_takes(shape);
  return (shape.q_tile == 8 || shape.q_tile == 16) && shape.dtype != Dtype::kF32 &&
         (shape.head_dim == 64 || shape.head_dim == 128);
}

bool tree_attention_packed_holds(const TreeAttentionShape& shape, int cell_bytes) {
  return !is_few(shape) || find(shape, cell_bytes).shared_bytes <= most_shared_bytes();
}

int tree_attention_packed_workers(const TreeAttentionShape& shape, int kv_heads, int cell_bytes) {
  if (!tree_attention_packed_holds(shape, cell_bytes)) return 0;
  const int blocks = max_blocks(find(shape, is_few(shape) ? cell_bytes : 1));
  return std::max(1, num_multiprocessors() * blocks / kv_heads);
}

void launch_tree_attention_packed(const TreeAttentionPackedParams& params,
                                  const TreeAttentionShape& shape, const float* v_signs, int rows,
                                  int workers, cudaStream_t stream) {
  TreeAttentionPackedParams with_cells = params;
  with_cells.cell_bytes = params.layer.cell_bytes();
  const PackedAttentionKernel kernel = find(shape, with_cells.cell_bytes);
  with_cells.cell_tiles = kernel.cell_tiles;
  if (kernel.attend_few != nullptr)
    launch_kernel(kernel.attend_few,
                  dim3((workers + kFewWarps - 1) / kFewWarps, params.kv_heads),
                  dim3(kernel.threads), kernel.shared_bytes, stream, true, with_cells, workers);
  else
    launch_kernel(kernel.attend, dim3(workers, params.kv_heads), dim3(kernel.threads),
                  kernel.shared_bytes, stream, true, with_cells);
  launch_merge(kernel.merge, params, shape, rows, stream);
  if (v_signs != nullptr)
    launch_rotate_back({params.out, v_signs, rows, params.heads, params.kv_heads, shape.head_dim},
                       shape.dtype, stream);
}

}  // namespace dendrite
