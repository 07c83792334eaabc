#include "packed_rows.h"

#include <algorithm>

#include "dendrite/copy_packed.cuh"
#include "dendrite/rope_store_packed.cuh"
#include "launch.h"

namespace dendrite {
namespace {

// Lanes that cover half a head.
int lanes_of(int dim) {
  int lanes = 1;
  while (lanes * kRopeVector < dim / 2) lanes *= 2;
  return lanes;
}

dim3 blocks_for(int64_t threads) { return dim3(unsigned((threads + kRopeThreads - 1) / kRopeThreads)); }

}  // namespace

void launch_rope_store_packed(const RopePackedParams& params, Dtype dtype, cudaStream_t stream) {
  const RopeParams& rope = params.rope;
  if (rope.tokens == 0) return;
  const int lanes = lanes_of(rope.dim);
  const dim3 grid = blocks_for(int64_t(rope.tokens) * (rope.heads + rope.kv_heads) * lanes);
  with_type(dtype, [&](auto type) {
    launch_kernel(rope_store_packed_kernel<decltype(type)>, grid, dim3(kRopeThreads), 0, stream, true,
                  params, lanes);
  });
}

void launch_rotate_back(const RotateParams& params, Dtype dtype, cudaStream_t stream) {
  const int lanes = lanes_of(params.dim);
  const dim3 grid = blocks_for(int64_t(params.rows) * params.heads * lanes);
  with_type(dtype, [&](auto type) {
    launch_kernel(rotate_back_kernel<decltype(type)>, grid, dim3(kRopeThreads), 0, stream, true,
                  params, lanes);
  });
}

void launch_copy_packed(const CopyPackedParams& params, cudaStream_t stream) {
  constexpr int64_t kBlocksPerMultiprocessor = 8;
  const int64_t pieces = (params.page_bytes + kCopyPackedPiece - 1) / kCopyPackedPiece;
  const int64_t blocks =
      std::min(params.max_copies * pieces, num_multiprocessors() * kBlocksPerMultiprocessor);
  if (blocks == 0) return;
  launch_kernel(copy_packed_kernel, dim3(unsigned(blocks)), dim3(kCopyPackedThreads), 0, stream, true,
                params);
}

}  // namespace dendrite
