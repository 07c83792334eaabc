#include "dendrite/elementwise.cuh"
#include "dendrite/take_tokens.cuh"
#include "elementwise.h"
#include "launch.h"

namespace dendrite {
namespace {

int blocks_for(int width, int vector) {
  const int per_block = kElementThreads * vector;
  return (width + per_block - 1) / per_block;
}

}  // namespace

void launch_embed(const EmbedParams& params, Dtype dtype, cudaStream_t stream) {
  if (params.rows == 0) return;
  const int blocks = blocks_for(params.width, kEmbedVector);
  with_type(dtype, [&](auto type) {
    launch_kernel(embed_kernel<decltype(type)>, dim3(unsigned(params.rows) * blocks),
                  dim3(kElementThreads), 0, stream, true, params, blocks);
  });
}

void launch_take_tokens(const TakeParams& params, cudaStream_t stream) {
  if (params.rows == 0) return;
  launch_kernel(take_tokens_kernel, dim3((params.rows + kTakeThreads - 1) / kTakeThreads),
                dim3(kTakeThreads), 0, stream, true, params);
}

void launch_silu_mul(const SiluParams& params, Dtype dtype, cudaStream_t stream) {
  if (params.rows == 0) return;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const int blocks = blocks_for(params.width, kSiluVector<T>);
    launch_kernel(silu_mul_kernel<T>, dim3(unsigned(params.rows) * blocks), dim3(kElementThreads),
                  0, stream, true, params, blocks);
  });
}

}  // namespace dendrite
