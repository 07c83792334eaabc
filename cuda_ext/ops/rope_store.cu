#include "dendrite/rope_store.cuh"
#include "launch.h"
#include "rope_store.h"

namespace dendrite {
namespace {

template <class T, int kWidth>
void launch(const RopeParams& params, cudaStream_t stream) {
  int lanes = 1;
  while (lanes * kWidth < params.dim / 2) lanes *= 2;
  const int64_t threads = int64_t(params.tokens) * (params.heads + params.kv_heads) * lanes;
  const int64_t blocks = (threads + kRopeThreads - 1) / kRopeThreads;
  launch_kernel(rope_store_kv_kernel<T, kWidth>, dim3(unsigned(blocks)), dim3(kRopeThreads), 0,
                stream, true, params, lanes);
}

}  // namespace

void launch_rope_store_kv(const RopeParams& params, Dtype dtype, cudaStream_t stream) {
  if (params.tokens == 0) return;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) == 2)
      if (params.dim % 16 == 0) return launch<T, 8>(params, stream);
    launch<T, 4>(params, stream);
  });
}

}  // namespace dendrite
