#include "dendrite/rope_store.cuh"
#include "launch.h"
#include "rope_store.h"

namespace dendrite {

void launch_rope_store_kv(const RopeParams& params, Dtype dtype, cudaStream_t stream) {
  if (params.tokens == 0) return;
  int lanes = 1;
  while (lanes * kRopeVector < params.dim / 2) lanes *= 2;
  const int64_t threads = int64_t(params.tokens) * (params.heads + params.kv_heads) * lanes;
  const int64_t blocks = (threads + kRopeThreads - 1) / kRopeThreads;
  with_type(dtype, [&](auto type) {
    launch_kernel(rope_store_kv_kernel<decltype(type)>, dim3(unsigned(blocks)), dim3(kRopeThreads),
                  0, stream, true, params, lanes);
  });
}

}  // namespace dendrite
